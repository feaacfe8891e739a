"""Runs that go on from another run's adapter: preference optimisation, then reinforcement learning."""

import json
from pathlib import Path

import pytest
import torch
from test_pairs import files, words  # noqa: F401
from test_training import SMALL, lines, run, state
from tiny import PROMPTS

from rlhf_img.algorithms import grpo
from rlhf_img.config import from_mapping
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import load_lora
from rlhf_img.model.loading import load
from rlhf_img.model.lora import role
from rlhf_img.model.sampling import sample
from rlhf_img.training import grpo as room
from rlhf_img.training.adapters import settings_of


@pytest.fixture(scope="module")
def first(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A finished run on pairs, whose adapter has moved."""
    out = tmp_path_factory.mktemp("start") / "dpo"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, words(files, out, "dpo.lr=1e-2", "dtype=float32", "max_winner_rise=null")) == 0
    return out


def second(files: Path, out: Path, start: Path, *more: str) -> list[str]:  # noqa: F811
    named = {
        "--start": start, "--prompts": files / "prompts.txt", "--eval-prompts": files / "prompts.txt",
        "--rewards": f"{files / 'bright.py'}:bright", "--out": out,
    }  # fmt: skip
    words = [str(word) for item in named.items() for word in item]
    return ["grpo", *words, *SMALL, "steps=3", "dtype=float32", *more]


def images(model_folder: Path, lora: Path) -> torch.Tensor:
    model = load(model_folder, dtype=torch.float32)
    load_lora(model, lora, "policy")
    with role(model.transformer, "policy"):
        return sample(model, Conditioner(model), PROMPTS, [1, 2, 3, 4], num_steps=3)


def test_policy_and_reference_begin_as_the_adapter_and_only_the_policy_moves(files: Path, first: Path) -> None:  # noqa: F811
    settings = {
        **settings_of(str(first), ("model",)), "start": str(first), "prompts": str(files / "prompts.txt"),
        "rewards": f"{files / 'bright.py'}:bright", "dtype": "float32", "eval": {"heldout_share": 0.5},
        "grpo": {"prompts": 2, "group": 3, "num_steps": 4, "lr": 1e-2}, "lora": {"rank": 2},
    }  # fmt: skip
    parts, job = room.prepare(from_mapping(room.Config, settings, "settings"))
    expected = images(files / "model", first / "lora")

    def drawn() -> torch.Tensor:
        return sample(parts.model, parts.conditioner, PROMPTS, [1, 2, 3, 4], num_steps=3)

    with parts.policy.acting():
        assert torch.equal(drawn(), expected)
    with parts.policy.reference():
        assert torch.equal(drawn(), expected)
    assert not torch.equal(drawn(), expected)  # the bare model is another one
    before = {name: p.detach().clone() for name, p in parts.policy.parameters.items()}
    assert all(p.shape[0] == 4 for name, p in before.items() if name.endswith("lora_A"))  # the adapter's rank, not 2
    job.iterate(1)
    assert any(not torch.equal(before[name], p) for name, p in parts.policy.parameters.items())
    with parts.policy.reference():
        assert torch.equal(drawn(), expected)


def test_rl_goes_on_where_preference_optimisation_ended(
    files: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    whole = tmp_path / "whole"
    assert run(monkeypatch, second(files, whole, first)) == 0
    then = json.loads((whole / "eval_before.json").read_text())["rewards"]["bright"]
    ended = json.loads((first / "eval.json").read_text())["checkpoints"][1]["rewards"]["bright"]["mean"]
    assert sum(then) / len(then) == pytest.approx(ended, abs=1e-5)
    # One adapter on the bare model holds both stages.
    assert not torch.equal(images(files / "model", whole / "lora"), images(files / "model", first / "lora"))

    killed, update, calls = tmp_path / "killed", grpo.update, []

    def failing(*given: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "update", failing)
        assert run(patch, second(files, killed, first)) == 130
    assert run(monkeypatch, ["grpo", "--out", str(killed), "--resume"]) == 0
    assert lines(killed) == lines(whole) and state(killed) == state(whole)


def test_people_calibrate_what_synthetic_pairs_began(
    files: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """A second stage on other pairs: at its start it is undecided, as it is its own reference."""
    out = tmp_path / "second"
    more = ("--start", str(first), "dtype=float32", "max_winner_rise=null", "steps=2")
    assert run(monkeypatch, [*words(files, out), *more]) == 0
    rows = lines(out)
    assert rows[0]["pairs/drift"] == 0.0 and rows[0]["pairs/accuracy"] == 0.5
    assert rows[1]["pairs/drift"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["full=true"], "rlhf-img export"),
        (["--start", "UNFINISHED"], "has no LoRA: finish it with --resume"),
        (["--start", "nowhere"], 'there is no folder "nowhere"'),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(
    files: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],  # noqa: F811
    more: list[str], message: str,
) -> None:  # fmt: skip
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((first / "config.yaml").read_text())
    given = [str(unfinished) if word == "UNFINISHED" else word for word in more]
    assert run(monkeypatch, [*second(files, tmp_path / "run", first), *given]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_taken_over_from_what_is_no_run(tmp_path: Path) -> None:
    assert settings_of(None, ("model",)) == {} == settings_of(str(tmp_path), ("model",))
