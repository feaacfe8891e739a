"""Runs that are killed, run out of disk or lose their folder go on to the same bits; the many kills are in soak.py."""

import os
import random
import resource
from pathlib import Path

import pytest
from soak import ALGORITHMS, KINDS, Point, Soak, differences, launch, left, make_files, words


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_runs_go_on_to_the_same_bits(algorithm: str, files: Path, tmp_path: Path) -> None:
    soak = Soak(algorithm, files, tmp_path)
    assert {"metrics.jsonl", "eval.json", "sentinels.json"} <= soak.whole.keys()
    assert any(name.endswith("policy.safetensors") for name in soak.whole)
    chance = random.Random(algorithm)
    kinds = [kind for kind in KINDS if soak.counts.get(kind)]
    points = [Point(kind, chance.randint(soak.counts[kind] // 3, soak.counts[kind] // 2)) for kind in kinds]
    assert soak.killed("killed", *points) == []


def no_room(_: Path) -> None:
    """As a full disk: no file may become longer than 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def forbid(out: Path) -> None:
    """As a folder that has become read-only, also for an administrator."""
    out.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize(
    ("action", "said"), [(no_room, "is full: nothing written before was lost"), (forbid, "Permission denied")]
)
def test_a_folder_that_cannot_be_written_any_more_costs_nothing(
    action: object, said: str, files: Path, tmp_path: Path
) -> None:
    soak = Soak("grpo", files, tmp_path)
    out = tmp_path / "grpo-hindered"
    after = soak.counts["forward"] // 2
    assert launch(words("grpo", files, out), out, Point("forward", after, action)) == 2  # type: ignore[arg-type]
    log = " ".join((tmp_path / "grpo-hindered.log").read_text().split())
    assert said in log and "--resume" in log and "Traceback" not in log
    out.chmod(0o755)
    assert launch(words("grpo", files, out), out) == 0
    assert differences(soak.whole, left(out)) == []
