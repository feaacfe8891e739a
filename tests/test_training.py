"""Runs end to end on a tiny random Krea 2: what they write, how they resume, and what stops them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_judges import FAULTS, completion, serving
from tiny import PROMPTS, save_tiny

from rlhf_img.cli.main import main
from rlhf_img.errors import RlhfImgError
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.intervals import interval, ratio_interval
from rlhf_img.training.prompts import read_prompts

SMALL = (
    "grpo.prompts=2", "grpo.group=3", "grpo.num_steps=4", "eval.num_steps=2", "eval.diversity_prompts=2",
    "eval.diversity_images=2", "samples=2", "checkpoint_every=1", "sample_every=0", "tracker=none", "lora.rank=4",
    "sentinels.every=0",
)  # fmt: skip
BRIGHT = """
def bright(prompts, images, **columns):
    return [float(image.mean()) for image in images.tensor]

def dark(prompts, images, **columns):
    return [1 - value for value in bright(prompts, images)]

bright.floor = 1e-4
"""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts and a reward."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "bright.py").write_text(BRIGHT)
    return folder


def arguments(
    files: Path, out: Path, *more: str, rewards: str | None = None, algorithm: str = "grpo"
) -> list[str]:
    named = {
        "--model": files / "model", "--prompts": files / "prompts.txt", "--eval-prompts": files / "prompts.txt",
        "--rewards": rewards or f"{files / 'bright.py'}:bright", "--out": out,
    }  # fmt: skip
    small = (word.replace("grpo.", f"{algorithm}.") for word in SMALL)
    return [algorithm, *(str(word) for pair in named.items() for word in pair), *small, *more]


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["rlhf-img", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def lines(run_folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the wall-clock times, which differ between equal runs."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def state(run_folder: Path) -> bytes:
    newest = max((run_folder / "checkpoints").iterdir())
    return (newest / "policy.safetensors").read_bytes()


def test_a_run_leaves_what_the_design_promises(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = "steps=3", "sample_every=2", f"eval.rewards={files / 'bright.py'}:dark"
    assert run(monkeypatch, arguments(files, out, *more, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["difference"]["pass_all"]["n"] == len(PROMPTS)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["after", "before", "step_000002"]
    assert [row["step"] for row in lines(out)] == [1, 2, 3]
    assert lines(out)[0]["preflight/max_dev"] == 0.0
    assert lines(out)[0]["reward/bright/unscored"] == 0.0 and "reward/dark/unscored" not in lines(out)[0]
    after = json.loads((out / "eval.json").read_text())["checkpoints"][1]
    assert after["name"] == "after" and after["rewards"].keys() == {"bright", "dark", "rubric"}
    assert "<html" in (out / "report.html").read_text()
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("setting", ["grpo.likelihood=forward", "grpo.likelihood=steps", "nft.decay=fast"])
def test_learning_raises_a_reward_that_can_be_raised(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    a = setting.split(".")[0]
    more = "steps=25", f"{a}.prompts=4", f"{a}.group=8", f"{a}.lr=3e-3", f"{a}.kl=0", "eval.num_steps=4", setting
    assert run(monkeypatch, arguments(files, tmp_path / "run", *more, algorithm=a)) == 0
    change = json.loads((tmp_path / "run" / "eval.json").read_text())["difference"]["rewards"]["bright"]
    assert change["low"] > 0


def test_resume_goes_further_but_changes_nothing_else(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, arguments(files, out, "steps=1")) == 0
    assert run(monkeypatch, ["grpo", "--out", str(out), "--resume", "grpo.lr=0.5"]) == 2
    assert "grpo would change" in capsys.readouterr().err
    assert run(monkeypatch, ["grpo", "--out", str(out), "--resume", "steps=2"]) == 0
    assert [row["step"] for row in lines(out)] == [1, 2]


def test_samples_that_a_run_was_drawing_when_it_was_killed_are_drawn_when_it_is_resumed(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as killed:
        killed.setattr("rlhf_img.training.loop._save_samples", lambda *_: sys.exit(137))
        assert run(monkeypatch, arguments(files, out, "steps=3", "sample_every=2")) == 137
    assert run(monkeypatch, ["grpo", "--out", str(out), "--resume"]) == 0
    assert (out / "samples" / "step_000002" / "samples.json").is_file()


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return [None] * len(prompts)", 3, "more than the 50%"),
        ("raise ValueError('no judge')", 3, "raised ValueError: no judge"),
        ("return [float('nan')] * len(prompts)", 3, "not a finite number"),
        ("return [0.5]", 2, "returned 1 values for"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_says_why(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    body: str, code: int, message: str,
) -> None:  # fmt: skip
    plugin = tmp_path / "broken.py"
    # Before training, held-out images are only looked at: six images are one iteration.
    plugin.write_text(
        "def broken(prompts, images, **columns):\n"
        f"    if len(prompts) != 6: return [0.5] * len(prompts)\n    {body}\n"
    )
    words = arguments(files, tmp_path / "run", "steps=2", rewards=f"{plugin}:broken")
    assert run(monkeypatch, words) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_some_unscored_images_are_counted_and_the_run_goes_on(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "partial.py"
    plugin.write_text(
        "def partial(prompts, images, **columns):\n"
        "    return [None if i == 0 else float(x.mean()) for i, x in enumerate(images.tensor)]\n"
    )
    words = arguments(files, tmp_path / "run", "steps=1", rewards=f"{plugin}:partial")
    assert run(monkeypatch, words) == 0
    assert lines(tmp_path / "run")[0]["reward/partial/unscored"] == pytest.approx(1 / 6)
    assert math.isfinite(lines(tmp_path / "run")[0]["loss"])


def test_what_the_judge_did_is_in_every_row_and_its_id_in_every_score(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    judge = {"url": "fake:", "model": "any", "max_failed": 0.9, "canary_every": 20}
    (tmp_path / "run.yaml").write_text(json.dumps({"rewards": [{"reward": "rubric", "options": {"judge": judge}}]}))
    out = tmp_path / "run"
    words = [
        "grpo", "--model", str(files / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--eval-prompts",
        str(tmp_path / "prompts.txt"), "--config", str(tmp_path / "run.yaml"), "--out", str(out), *SMALL, "steps=2",
        f"compute.text_store={tmp_path / 'text'}",
    ]  # fmt: skip
    assert run(monkeypatch, words) == 0
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 3  # both prompts and the empty one
    # Both prompts are in each iteration, with three images each: is it there, is it one, and is it red.
    asked = [row["judge/calls"] - (16 if "judge/drift" in row else 0) for row in lines(out)]
    assert asked == [15, 15] and all(row["judge/failed"] == 0 for row in lines(out))
    drifts = [row["judge/drift"] for row in lines(out) if "judge/drift" in row]
    assert set(drifts) == {0.0} and "judge/seconds_p95" in lines(out)[0]
    samples = json.loads((out / "samples" / "after" / "samples.json").read_text())
    assert all(r["evidence"].startswith("fake: P(yes)") for s in samples for r in s["requirements"])


def run_with_server(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any, **settings: Any
) -> int:
    """Two iterations whose rubrics a server judges."""
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    judge = {"url": f"http://127.0.0.1:{server.server_address[1]}/v1", "model": "eye", "attempts": 1} | settings
    reward = {"reward": "rubric", "options": {"judge": judge}}
    (tmp_path / "run.yaml").write_text(json.dumps({"rewards": [reward]}))
    words = [
        "grpo", "--model", str(files / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--eval-prompts",
        str(tmp_path / "prompts.txt"), "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *SMALL,
        "steps=2", "max_unscored=1",  # which requests share a connection, and fail with it, is chance
    ]  # fmt: skip
    return run(monkeypatch, words)


def test_a_run_goes_on_with_unscored_values_while_a_judge_misbehaves(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [FAULTS[name][0] for name in ("500", "disconnect", "half-written JSON", "wrong schema", "drip")]

    def reply(handler: Any, body: dict[str, Any], n: int) -> Any:
        if n % 5:
            return completion(top={"Yes": 0.2 + 0.5 * (n % 2), "No": 0.1})
        return faults[n // 5 % len(faults)](handler, body, n)

    with serving(reply) as server:
        settings = {"max_failed": 0.9, "timeout_s": 5.0, "canary_every": 0}
        assert run_with_server(files, tmp_path, monkeypatch, server, **settings) == 0
    rows = lines(tmp_path / "run")
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    assert sum(row["judge/failed"] for row in rows) >= 4 and all(row["judge/failed"] < 15 for row in rows)


def test_a_run_stops_where_its_judge_fails_too_often(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda h, body, n: completion(top={"Yes": 0.8}) if n <= 10 else h.send(500, b"boom")) as server:
        assert run_with_server(files, tmp_path, monkeypatch, server, max_failed=0.3) == 3
    said = capsys.readouterr().err
    assert "more than the 30% that max_failed allows" in " ".join(said.split()) and "HTTP 500" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["grpo.clipp=1"], 'did you mean "clip"'),
        (["grpo.lr=fast"], "grpo.lr"),
        (["grpo.group=1"], "grpo.group must be 2 or more"),
        (["--rewards", "rubrik"], 'did you mean "rubric"'),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "nowhere.sqlite"], "rlhf-img prompts add nowhere.sqlite"),
        (["pool.explore=0"], "pool.explore is a share above 0"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--rewards", "rubric", "eval.rewards=rubric"], "another `name`"),
        (["tracker=tensorbord"], "tensorboard"),
        (["--out", "/proc/nowhere"], "cannot be written"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_a_user_gets_wrong_is_said(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    assert run(monkeypatch, [*arguments(files, tmp_path / "run", "steps=1"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_prompts_are_read_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red circle\n\na red circle\na star\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cross", "other": 1}\n')
    (tmp_path / "a.yaml").write_text(
        "version: 1\nprompt: a red circle\nrequirements:\n  - {id: circle, check: object, target: circle}\n"
    )
    assert [p.text for p in read_prompts(tmp_path / "a.txt")] == ["a red circle", "a star"]
    assert [p.text for p in read_prompts(tmp_path / "a.jsonl")] == ["a cross"]
    (with_rubric,) = read_prompts(tmp_path / "a.yaml")
    assert with_rubric.rubric is not None and with_rubric.rubric.requirements[0].id == "circle"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty"),
        ("a.jsonl", '{"promt": "x"}\n', "line 1.*prompt"),
        ("a.jsonl", "{not json\n", "line 1: not JSON"),
        ("a.csv", "x", "read from .txt, .jsonl, .yaml"),
        ("a.yaml", "version: 1\nprompt: x\nrequirements:\n"
         "  - {id: a, check: object, target: cat, needs: [b]}\n  - {id: b, check: object, target: dog, needs: [a]}\n",
         "a.*b.*a"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_say_so(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RlhfImgError, match=message):
        read_prompts(tmp_path / name)


def test_an_epoch_holds_every_prompt_once_and_depends_on_its_step_alone() -> None:
    steps = [prompt_room.turns(np.zeros(10, int), 5, step, seed=1) for step in range(4)]
    assert set(steps[0] + steps[1]) == set(steps[2] + steps[3]) == set(range(10))
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert prompt_room.turns(np.zeros(10, int), 5, 3, seed=1) == steps[3]
    assert sorted(prompt_room.turns(np.zeros(2, int), 5, 3, seed=1)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_the_prompts_of_an_iteration_are_about_as_long_and_those_left_over_have_their_turn() -> None:
    lengths = np.random.default_rng(0).integers(8, 26, 403)
    epoch = [prompt_room.turns(lengths, 8, step, seed=1) for step in range(50)]
    assert len({i for drawn in epoch for i in drawn}) == 400
    assert sum(len(set(lengths[drawn])) > 1 for drawn in epoch) <= 17  # at most where two of the 18 lengths meet
    means = [lengths[drawn].mean() for drawn in epoch]
    assert all(abs(np.mean(means[i : i + 8]) - np.mean(means)) < 1.5 for i in range(43))  # short and long in any eight
    assert {i for step in range(150) for i in prompt_room.turns(lengths, 8, step, seed=1)} == set(range(403))


def test_intervals_hold_their_mean_and_ignore_what_is_not_known() -> None:
    values = [0.0, 1.0] * 50 + [math.nan]
    found = interval(values)
    assert found["n"] == 100 and found["mean"] == 0.5
    assert found["low"] == pytest.approx(0.4, abs=0.02) and found["high"] == pytest.approx(0.6, abs=0.02)
    assert interval([1.0, 1.0])["low"] == interval([1.0, 1.0])["high"] == 1.0
    assert interval([math.nan])["mean"] is None
    assert ratio_interval(np.array([1.0, 3.0]), np.array([2.0, 6.0]))["low"] == 0.5


def command(files: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "rlhf_img.cli.main", *arguments(files, out, "grpo.prompts=4", *more)]


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_do_what_one_does(files: Path, tmp_path: Path, processes: int) -> None:
    found = []
    for count in (1, processes):
        out = tmp_path / str(count)
        rewards = f"{files / 'bright.py'}:bright,rubric"
        more = "steps=2", "eval.diversity_prompts=4", "--rewards", rewards, "--processes", str(count)
        more += ("pool.curriculum=true",)
        subprocess.run(command(files, out, *more), check=True, stdout=subprocess.DEVNULL)
        found.append((lines(out), json.loads((out / "eval.json").read_text()), files_of(out)))
    (one, one_eval, one_files), (many, many_eval, many_files) = found
    assert [row.keys() for row in many] == [row.keys() for row in one]
    assert many[0] == pytest.approx(one[0], rel=1e-4, abs=1e-6, nan_ok=True)
    # Adam's first step is the gradient's sign, so that from then on rounding counts.
    assert many[1]["reward/bright/mean"] == pytest.approx(one[1]["reward/bright/mean"], rel=0.01)
    (many_before, many_after), (one_before, one_after) = many_eval["checkpoints"], one_eval["checkpoints"]
    for key in ("pass_all", "rewards", "by_check", "diversity"):
        assert flat(many_before[key]) == pytest.approx(flat(one_before[key]), rel=1e-6)
    assert many_after["rewards"]["bright"] == pytest.approx(one_after["rewards"]["bright"], rel=0.01)
    assert many_files == one_files


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def flat(tree: dict[str, Any]) -> dict[str, float]:
    inner = {f"{a}/{b}": x for a, value in tree.items() if isinstance(value, dict) for b, x in value.items()}
    return inner or tree


def test_a_killed_process_ends_the_others_and_the_run_goes_on(files: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(files, whole, "steps=4"), check=True, stdout=subprocess.DEVNULL)
    with subprocess.Popen(command(files, killed, "steps=4", "--processes", "2"), stdout=subprocess.DEVNULL) as process:
        deadline = time.time() + 300
        while not (killed / "checkpoints" / "step_000002").exists() and time.time() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        started = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        os.kill(max(int(pid) for pid in started.stdout.split()), signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
    subprocess.run(  # by one process, what two began
        [sys.executable, "-m", "rlhf_img.cli.main", "grpo", "--out", str(killed), "--resume", "--processes", "1"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert [row["step"] for row in lines(killed)] == [1, 2, 3, 4]
    assert lines(killed)[0] == pytest.approx(lines(whole)[0], rel=1e-4, abs=1e-6, nan_ok=True)
    assert lines(killed)[3]["reward/bright/mean"] == pytest.approx(lines(whole)[3]["reward/bright/mean"], rel=0.01)


def test_an_error_of_all_processes_is_said_once(files: Path, tmp_path: Path) -> None:
    words = command(files, tmp_path / "run", "--processes", "2", "--rewards", "rubic")
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("error:") == 1 and 'did you mean "rubric"' in ended.stderr


def test_prompts_that_cannot_be_shared_are_an_error(files: Path, tmp_path: Path) -> None:
    ended = subprocess.run(command(files, tmp_path / "run", "--processes", "3"), capture_output=True, text=True)
    assert ended.returncode == 2
    assert "grpo.prompts must be a multiple of the number of processes, 3" in ended.stderr
    assert ended.stderr.count("error:") == 1
