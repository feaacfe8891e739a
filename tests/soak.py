"""Kills runs at random points with SIGKILL, resumes them, and compares with uninterrupted runs, to the bit.

    python tests/soak.py --kills 20                    # what `make soak` does: 20 of each algorithm
    python tests/soak.py --kills 3 --algorithms dpo --seed 7

A point is one of three kinds, each counted in an uninterrupted run and then drawn at random: a file or folder of the
run that is opened, made, renamed or removed (so also within a checkpoint), a forward of a transformer's block (so also
within a rollout, a gradient and an evaluation), and a call of the reward (so while it is in flight). The process counts
its own audit events and kills itself; nothing in the product knows of it. Half of the resumed runs are killed again.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny import PROMPTS, SIZE, save_tiny

KINDS = ("file", "forward", "reward")
_FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
_REWARD = """
import sys

def bright(prompts, images, **columns):
    sys.audit("soak.reward")
    return [float(image.mean()) for image in images.tensor]

bright.floor = 1e-4
"""
_SHARED = (
    "steps=3", "eval.num_steps=2", "eval.diversity_prompts=2", "eval.diversity_images=2", "samples=2", "tracker=none",
    "checkpoint_every=1", "sample_every=2", "lora.rank=4", "sentinels.prompts=2", "sentinels.every=1",
    "sentinels.stop=null",
)  # fmt: skip
ALGORITHMS = {
    "grpo": ("grpo.prompts=2", "grpo.group=3", "grpo.num_steps=4", "--processes", "1"),
    "nft": ("nft.prompts=2", "nft.group=3", "nft.num_steps=4", "--processes", "1"),
    "dpo": ("dpo.pairs=4", "dpo.draws=1", "heldout_pairs=4", "measure_every=2", "--pairs", "{files}/pairs"),
    "tdm": ("tdm.prompts=2", "tdm.images=2", "tdm.num_steps=2", "tdm.warmup=2", "full_steps=3", "panel.every=1",
            "--teacher", "none"),
}
"""What each algorithm adds to the command; one more line is one more algorithm."""
_ON_RESUME = {"grpo": ("--processes", "1"), "nft": ("--processes", "1")}


@dataclass(frozen=True)
class Point:
    """The `number`th event of this kind, from 1; what happens there is `action`: by default, the process is killed."""

    kind: str
    number: int
    action: Callable[[Path], None] | None = None


def make_files(folder: Path) -> Path:
    """A tiny model, prompts, pairs and a reward."""
    from PIL import Image

    from rlhf_img.training.pairs import Pair, encode_image, write_pairs

    def png(level: int) -> bytes:
        return encode_image(Image.new("RGB", (SIZE, SIZE), (level, level, 255 - level)))

    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "bright.py").write_text(_REWARD)
    texts = [f"{prompt}{end}" for prompt in PROMPTS for end in ("", " on grey", " above a star")]
    pairs = [Pair(prompt=texts[i % 12], chosen=png(200 - i), rejected=png(i), source="by hand") for i in range(24)]
    write_pairs(folder / "pairs" / "pairs-00000.parquet", pairs)
    return folder


def words(algorithm: str, files: Path, out: Path) -> list[str]:
    """The command line of a run, or where there is one already, of going on with it."""
    if (out / "config.yaml").exists():
        return [algorithm, "--out", str(out), "--resume", *_ON_RESUME.get(algorithm, ())]
    named = {
        "--model": files / "model", "--eval-prompts": files / "prompts.txt", "--rewards": f"{files}/bright.py:bright",
        "--out": out, **({} if algorithm == "dpo" else {"--prompts": files / "prompts.txt"}),
    }  # fmt: skip
    own = [word.format(files=files) for word in ALGORITHMS[algorithm]]
    return [algorithm, *(str(word) for pair in named.items() for word in pair), *_SHARED, *own]


def launch(command: list[str], out: Path, point: Point | None = None, counts: Path | None = None) -> int:
    """Runs the command in a process of its own; its exit code, which is -9 for a killed one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([  # imported once, for all
        "rlhf_img.cli.main", "rlhf_img.cli.align", "rlhf_img.report", "rlhf_img.training.grpo",
        "rlhf_img.training.nft", "rlhf_img.training.dpo", "rlhf_img.training.tdm", "rlhf_img.rubrics.vision",
    ])  # fmt: skip
    process = context.Process(target=_child, args=(command, out, point, counts))
    process.start()
    process.join()
    return process.exitcode if process.exitcode is not None else 1


def _child(command: list[str], out: Path, point: Point | None, counts: Path | None) -> None:
    import torch
    from diffusers.models.transformers.transformer_krea2 import Krea2TransformerBlock

    from rlhf_img.cli.main import main

    torch.set_num_threads(1)
    with open(out.parent / f"{out.name}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    seen: Counter[str] = Counter()
    acted = False

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal acted
        kind = event.removeprefix("soak.") if event.startswith("soak.") else None
        if event in _FILE_EVENTS and str(out) in str(arguments[0]):
            kind = "file"
        if kind is None or acted:
            return
        seen[kind] += 1
        if point is not None and (kind, seen[kind]) == (point.kind, point.number):
            acted = True
            if point.action is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                point.action(out)

    def forward(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, Krea2TransformerBlock):
            sys.audit("soak.forward")

    torch.nn.modules.module.register_module_forward_pre_hook(forward)
    sys.argv = ["rlhf-img", *command]
    sys.addaudithook(look)
    try:
        main()
    finally:
        if counts is not None:
            counts.write_text(json.dumps(seen))


def left(out: Path) -> dict[str, object]:
    """All that a run leaves and that must be the same: its metrics without times, weights, states and images."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, object] = {
        "metrics.jsonl": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    }
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        # config.yaml names the command, card.json times; the report shows both
        if path.is_file() and name not in ("metrics.jsonl", "config.yaml", "card.json", "report.html", ".lock"):
            found[name] = _weights(path) if path.suffix == ".safetensors" else path.read_bytes()
    return found


def _weights(path: Path) -> tuple[object, bytes]:
    """Header and bytes of a safetensors file, whose header says the same in an order that changes from time to time.

    Without the name that a run gives itself in a prompt pool's state.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if state := header.get("__metadata__", {}).pop("state", None):
        header["state"] = {key: value for key, value in json.loads(state).items() if key != "run"}
    return header, content[end:]


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class Soak:
    """An uninterrupted run of an algorithm, and runs that are killed."""

    def __init__(self, algorithm: str, files: Path, folder: Path) -> None:
        self.algorithm, self.files, self.folder = algorithm, files, folder
        whole, counts = folder / f"{algorithm}-whole", folder / f"{algorithm}-counts.json"
        if code := launch(words(algorithm, files, whole), whole, counts=counts):
            said = (folder / f"{whole.name}.log").read_text()
            raise RuntimeError(f"the uninterrupted run ended with {code}:\n{said}")
        self.whole, self.counts = left(whole), json.loads(counts.read_text())

    def draw(self, chance: random.Random) -> Point:
        """A random point of a random kind."""
        kind = chance.choice([kind for kind in KINDS if self.counts.get(kind)])
        return Point(kind, chance.randint(1, self.counts[kind]))

    def killed(self, name: str, *points: Point) -> list[str]:
        """What differs from the uninterrupted run after these kills, or why the run did not end."""
        out = self.folder / f"{self.algorithm}-{name}"
        for point in (*points, None):
            code = launch(words(self.algorithm, self.files, out), out, point)
            if code not in (0, -signal.SIGKILL):
                return [f"exit code {code} after {point}:\n{(out.parent / f'{out.name}.log').read_text()[-3000:]}"]
        return differences(self.whole, left(out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed, of each algorithm")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    given = parser.parse_args()
    chance, failed = random.Random(given.seed), 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    files = make_files(folder / "files")
    for algorithm in given.algorithms.split(","):
        soak, good = Soak(algorithm, files, folder), 0
        for i in range(given.kills):
            points = [soak.draw(chance) for _ in range(1 + chance.randrange(2))]
            wrong = soak.killed(str(i), *points)
            good += not wrong
            said = ", ".join(f"{p.kind} {p.number} of {soak.counts[p.kind]}" for p in points)
            print(f"{algorithm} {i + 1}/{given.kills}, killed at {said}: {'; '.join(wrong) or 'the same'}", flush=True)
        print(f"{algorithm}: {good} of {given.kills} the same to the bit", flush=True)
        failed += given.kills - good
    if failed:
        print(f"what was left is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
