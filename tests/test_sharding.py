"""Sharded training by several processes: the same numbers as one, no waiting for ever, checkpoints for any number."""

import dataclasses
import json
import os
import shutil
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
from together import PATIENCE, command, said, start, together, wait
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import load_weights
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import load
from rlhf_img.model.lora import role, role_parameters
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
    "dpo": ("dpo.pairs=4", "dpo.loss=stpo-guard", "dpo.calibration_steps=1", "heldout_pairs=3", "measure_every=2",
            "max_winner_rise=null", "max_detail_change=null", "detail_images=1"),
    "tdm": ("tdm.prompts=4", "tdm.images=2", "tdm.num_steps=2", "panel.every=1", "panel.prompts=1", "full_steps=2",
            "card=false"),
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


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sharded_processes_do_what_one_does(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, full: bool
) -> None:
    more = (f"full={str(full).lower()}",)
    assert run(monkeypatch, words(files, algorithm, tmp_path / "one", *more, "--processes", "1")) == 0
    sharded = words(files, algorithm, tmp_path / "two", *more, "shard=true")
    assert together(2, tmp_path / "workers", command, sharded) == [0, 0]
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    assert two[0] == pytest.approx(one[0], rel=1e-3, abs=1e-5, nan_ok=True)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=0.05)  # Adam's first step is the gradient's sign
    before = [json.loads((tmp_path / name / "eval_before.json").read_text()) for name in ("one", "two")]
    for key in ("diversity", "high_freq"):
        assert before[1][key] == pytest.approx(before[0][key], rel=1e-4)
    assert before[1]["rewards"]["bright"] == pytest.approx(before[0]["rewards"]["bright"], rel=1e-4)
    assert (tmp_path / "two" / "samples" / "step_000001" / "000.png").is_file()
