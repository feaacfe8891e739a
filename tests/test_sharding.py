"""Sharded training by several processes: the same numbers as one, no waiting for ever, checkpoints for any number."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pairs import pair
from test_training import BRIGHT, lines, run
from tiny import PROMPTS, save_tiny, tiny_model
from together import PATIENCE, command, said, start, together
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import load
from rlhf_img.model.policy import LoRAConfig, Policy, make_policy, make_role
from rlhf_img.model.sampling import sample
from rlhf_img.model.sharding import whole
from rlhf_img.training import distributed
from rlhf_img.training.pairs import write_pairs
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.state import load_state, save_state

LONG = "a red circle above " + ", ".join(["two blue stars on grey"] * 12)
TEXTS = [*PROMPTS[:3], LONG]
"""Four prompts of four lengths, from 9 to over 100 tokens."""
COMMON = (
    "eval.num_steps=2", "eval.prompts=3", "eval.diversity_prompts=1", "eval.diversity_images=2", "samples=1", "steps=2",
    "checkpoint_every=1", "sample_every=1", "tracker=none", "lora.rank=4", "dtype=float32",
)  # fmt: skip
ALGORITHMS = {
    "grpo": ("grpo.prompts=4", "grpo.group=3", "grpo.num_steps=3"),
    "nft": ("nft.prompts=4", "nft.group=3", "nft.num_steps=3"),
    "dpo": ("dpo.pairs=4", "dpo.loss=stpo-guard", "dpo.calibration_steps=1", "heldout_pairs=3", "measure_every=2",
            "max_winner_rise=null"),
    "tdm": ("tdm.prompts=4", "tdm.images=2", "tdm.num_steps=2", "tdm.warmup=1", "panel.every=1",
            "panel.prompts=1", "full_steps=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, a reward, and 20 pairs."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    (folder / "bright.py").write_text(BRIGHT)
    texts = [f"{prompt}{end}" for prompt in TEXTS for end in ("", " on grey", " above a star", " left of it", " .")]
    write_pairs(folder / "pairs" / "pairs-00000.parquet", [pair(i, text) for i, text in enumerate(texts)])
    return folder


def words(files: Path, algorithm: str, out: Path, *more: str) -> list[str]:
    data = ("--pairs", str(files / "pairs")) if algorithm == "dpo" else ("--prompts", str(files / "prompts.txt"))
    data += ("--teacher", "none") if algorithm == "tdm" else ()
    return [
        algorithm, "--model", str(files / "model"), *data, "--eval-prompts", str(files / "prompts.txt"), "--rewards",
        f"{files / 'bright.py'}:bright", "--out", str(out), *COMMON, *ALGORITHMS[algorithm], *more,
        *(("eval.num_steps=2",) if algorithm == "tdm" else ()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "full", "shard"),
    [("grpo", False, True), ("grpo", True, True), ("nft", False, True), ("nft", True, True),
     ("dpo", False, True), ("dpo", True, True), ("dpo", False, False),
     ("tdm", False, True), ("tdm", True, True), ("tdm", True, False)],
)  # fmt: skip
def test_two_processes_do_what_one_does(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, full: bool, shard: bool
) -> None:
    more = [f"full={str(full).lower()}"]
    more += [f"card={str(not full).lower()}"] if algorithm == "tdm" else []
    assert run(monkeypatch, words(files, algorithm, tmp_path / "one", *more, "--processes", "1")) == 0
    shared = words(files, algorithm, tmp_path / "two", *more, f"shard={str(shard).lower()}",
                   f"compute.text_store={tmp_path / 'text'}")  # fmt: skip
    assert together(2, tmp_path / "workers", command, shared) == [0, 0]
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    known = {key for key, value in one[0].items() if value is not None}
    assert known == {key for key, value in two[0].items() if value is not None}
    counted = {key for key in known if key.endswith("/place")}  # a share of comparisons, of which some are near
    assert [two[0][key] for key in counted] == pytest.approx([one[0][key] for key in counted], abs=0.03)
    known -= counted
    assert [two[0][key] for key in known] == pytest.approx([one[0][key] for key in known], rel=1e-3, abs=1e-5)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.05)  # Adam's first step is the gradient's sign
    before = [json.loads((tmp_path / name / "eval_before.json").read_text()) for name in ("one", "two")]
    for key in ("diversity", "high_freq"):
        assert before[1][key] == pytest.approx(before[0][key], rel=1e-4)
    assert before[1]["rewards"]["bright"] == pytest.approx(before[0]["rewards"]["bright"], rel=1e-4)
    assert (tmp_path / "two" / "samples" / "step_000001" / "000.png").is_file()


def moved() -> tuple[Policy, torch.optim.Optimizer]:
    """A fully trained policy after one optimiser step on gradients that are known."""
    model = tiny_model()
    (policy,) = distributed.shard(model, [make_policy(model.transformer, None, seed=0)], wanted=True)
    optimizer = torch.optim.AdamW(list(policy.parameters.values()), lr=1e-2)
    for i, parameter in enumerate(policy.parameters.values()):
        parameter.grad = torch.full_like(parameter.detach(), 0.1 * (i % 3 - 1))
    optimizer.step()
    policy.update_average(0.5)
    return policy, optimizer


def values(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole."""
    found = {f"weights/{name}": whole(p.detach()) for name, p in policy.parameters.items()}
    found |= {f"average/{name}": whole(a) for name, a in policy.average.items()}
    for name, parameter in policy.parameters.items():
        found |= {f"{key}/{name}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def save(out: Path, step: int = 1, resume: bool = False) -> dict[str, Tensor]:
    policy, optimizer = moved()
    run = RunDir.create(out, resume=resume) if distributed.is_first() else RunDir.follow(out)
    with run:
        run.save_checkpoint(step, lambda folder: save_state(folder, {"policy": (policy, optimizer)}, step))
    return values(policy, optimizer)


def saves(out: Path) -> dict[str, Tensor]:
    with distributed.joined():
        return save(out)


def loads(out: Path) -> dict[str, Tensor]:
    with distributed.joined():
        model = tiny_model()
        (policy,) = distributed.shard(model, [make_policy(model.transformer, None, seed=0)], wanted=True)
        optimizer = torch.optim.AdamW(list(policy.parameters.values()), lr=1e-2)
        checkpoint = RunDir.follow(out).latest_checkpoint()
        assert checkpoint is not None
        assert load_state(checkpoint.path, {"policy": (policy, optimizer)}) == checkpoint.step
        return values(policy, optimizer)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2)])
def test_a_checkpoint_comes_back_to_the_bit_on_another_number_of_processes(
    tmp_path: Path, before: int, after: int
) -> None:
    saved = together(before, tmp_path / "saves", saves, tmp_path / "run") if before > 1 else [saves(tmp_path / "run")]
    folder = tmp_path / "run" / "checkpoints" / "step_000001" / "policy"
    assert len(list(folder.glob("*.safetensors"))) == (before if before > 1 else 0)
    found = together(after, tmp_path / "loads", loads, tmp_path / "run") if after > 1 else [loads(tmp_path / "run")]
    for values in [*saved[1:], *found]:
        assert values.keys() == saved[0].keys()
        assert all(torch.equal(value, saved[0][name]) for name, value in values.items())


def damaged(folder: Path) -> None:
    (folder / "policy" / "shard-00002-model-00001-of-00001.safetensors").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "policy" / "shard-00001-model-00001-of-00001.safetensors", 5000)


@pytest.mark.parametrize(
    ("harm", "message"), [(damaged, "parts are missing.*shard-00002"), (truncated, "cannot be read")]
)
def test_a_part_that_is_lost_or_cut_is_said(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    together(2, tmp_path / "saves", saves, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoints" / "step_000001")
    with pytest.raises(RlhfImgError, match=f"{message}.*resume from an earlier one"):
        loads(tmp_path / "run")


def dies_while_it_saves(out: Path) -> str:
    """The second process is killed in the middle of a second checkpoint; what the first says of it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    try:
        with distributed.joined():  # once: who comes to a second time early meets the first one's store
            save(out)
            if distributed.rank():
                HuggingFaceStorageWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
            save(out, step=2, resume=True)
    except RlhfImgError as error:
        return str(error)
    return "nothing"


def test_a_writer_that_is_killed_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    running = start(2, tmp_path / "workers", dies_while_it_saves, tmp_path / "run")
    for process in running:
        process.join(PATIENCE)
    assert [process.exitcode for process in running] == [0, -signal.SIGKILL]
    heard = torch.load(tmp_path / "workers" / "result-0", weights_only=True)
    assert "another process of this run has ended" in heard and "--resume" in heard
    assert [c.step for c in RunDir.follow(tmp_path / "run").checkpoints()] == [1]
    assert loads(tmp_path / "run").keys()


def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_another_number(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    more = "steps=60", "full=true", "sample_every=0"
    running = start(2, tmp_path / "workers", command, words(files, "grpo", out, *more, "shard=true"))
    deadline = time.monotonic() + PATIENCE
    while not (out / "checkpoints" / "step_000002").exists() and time.monotonic() < deadline:
        assert all(process.exitcode is None for process in running), said(tmp_path / "workers", 0)
        time.sleep(0.01)
    running[1].kill()
    running[0].join(PATIENCE)
    assert torch.load(tmp_path / "workers" / "result-0", weights_only=True) == 2  # the exit code of its command
    assert "another process of this run has ended" in said(tmp_path / "workers", 0)
    last = max(c.step for c in RunDir.follow(out).checkpoints())
    assert 2 <= last < 60
    assert run(monkeypatch, ["grpo", "--out", str(out), "--resume", "--processes", "1", f"steps={last + 1}"]) == 0
    assert [row["step"] for row in lines(out)] == list(range(1, last + 2))


def trains_one_role() -> dict[str, Any]:
    """One step of one of two roles over a sharded base, after both and the base were used."""
    with distributed.joined():
        model = tiny_model()
        model.transformer.enable_gradient_checkpointing()
        roles = [make_role(model.transformer, name, LoRAConfig(rank=4), i, start=None) for i, name in enumerate("ab")]
        one, other = distributed.shard(model, roles, wanted=True)
        with torch.no_grad():
            for p in [*one.parameters.values(), *other.parameters.values()]:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        before = {name: whole(value).clone() for name, value in model.transformer.state_dict().items()}
        text = Conditioner(model).encode(TEXTS[:1])[0][None]
        x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(distributed.rank()))
        optimizer = torch.optim.SGD([*one.parameters.values(), *other.parameters.values()], lr=0.1)
        with one.acting() as transformer:
            v = velocity(transformer, x, torch.tensor(0.5), text, (2, 2))
            with one.reference() as reference:
                velocity(reference, x, torch.tensor(0.5), text, (2, 2))
            with torch.no_grad(), other.acting() as transformer:
                velocity(transformer, x, torch.tensor(0.5), text, (2, 2))
            v.square().mean().backward()
        distributed.average_gradients(one.parameters.values())
        gradients = {name: p.grad for name, p in one.parameters.items()}
        idle = [p.grad for p in other.parameters.values()]
        optimizer.step()
        after = {name: whole(value) for name, value in model.transformer.state_dict().items()}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        return {"gradients": gradients, "idle": idle, "changed": changed}


def test_the_role_that_acts_learns_and_nothing_else_moves_by_a_bit(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, trains_one_role)
    assert all(gradient is None for gradient in first["idle"])
    assert first["changed"] and all(".a.weight" in name for name in first["changed"])
    model = tiny_model()
    one, _ = (make_role(model.transformer, name, LoRAConfig(rank=4), i, start=None) for i, name in enumerate("ab"))
    with torch.no_grad():
        for p in one.parameters.values():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    x = torch.cat([torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(rank)) for rank in range(2)])
    text = Conditioner(model).encode(TEXTS[:1])[0][None].expand(2, -1, -1)
    with one.acting() as transformer:
        velocity(transformer, x, torch.tensor(0.5), text, (2, 2)).square().mean().backward()
    for name, p in one.parameters.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        # Sums in another order: how far apart they round differs between processors.
        torch.testing.assert_close(first["gradients"][name], p.grad, rtol=1e-3, atol=1e-6)


def samples_unevenly() -> Tensor:
    """The first process draws three images and the second one."""
    with distributed.joined():
        model = tiny_model()
        policy = make_policy(model.transformer, LoRAConfig(rank=4), seed=0)
        distributed.shard(model, [policy], wanted=True)
        mine = [0, 1, 3] if distributed.is_first() else [2]
        return sample(model, Conditioner(model), [TEXTS[i] for i in mine], mine, num_steps=2, guidance=1.0)


def test_processes_with_unequal_work_do_not_wait_for_ever(tmp_path: Path) -> None:
    model = tiny_model()
    alone = sample(model, Conditioner(model), TEXTS, range(4), num_steps=2, guidance=1.0)
    first, second = together(2, tmp_path, samples_unevenly)
    torch.testing.assert_close(torch.cat([first[:2], second, first[2:]]), alone, rtol=1e-4, atol=1e-5)


def shards_in_bfloat16(folder: Path, full: bool) -> dict[str, Any]:
    """The velocity of a sharded bfloat16 model, and its gradient; norms are float32 there."""
    with distributed.joined():
        model = load(folder, dtype=torch.bfloat16, device="cpu")
        policy = make_policy(model.transformer, None if full else LoRAConfig(rank=4), seed=0)
        (policy,) = distributed.shard(model, [policy], wanted=True)
        text = Conditioner(model).encode(TEXTS[:1])[0][None]
        x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
        with policy.acting() as transformer:
            v = velocity(transformer, x, torch.tensor(0.5), text, (2, 2))
            v.square().mean().backward()
        norm = policy.clip_gradients(1e9)
        return {"v": v.detach(), "norm": float(norm), "dtypes": {p.dtype for p in policy.parameters.values()}}


@pytest.mark.parametrize("full", [False, True])
def test_a_bfloat16_base_is_sharded_with_float32_norms_and_adapters(files: Path, tmp_path: Path, full: bool) -> None:
    alone = shards_in_bfloat16(files / "model", full)
    for found in together(2, tmp_path, shards_in_bfloat16, files / "model", full):
        assert torch.equal(found["v"], alone["v"])
        assert found["norm"] == pytest.approx(alone["norm"], rel=1e-3)
        assert found["dtypes"] == alone["dtypes"] == ({torch.float32, torch.bfloat16} if full else {torch.float32})

