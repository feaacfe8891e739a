"""Runs that are killed, run out of disk or lose their folder go on to the same bits; the many kills are in soak.py."""

import os
import random
import resource
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from soak import ALGORITHMS, KINDS, Point, Soak, differences, launch, left, make_files, words

Uninterrupted = Callable[[str], Soak]


@pytest.fixture(scope="module")
def soaks(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """An uninterrupted run of an algorithm, made when first asked for."""
    folder = tmp_path_factory.mktemp("soak")
    files = make_files(folder / "files")
    return cache(lambda algorithm: Soak(algorithm, files, folder))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_runs_go_on_to_the_same_bits(algorithm: str, soaks: Uninterrupted) -> None:
    soak, chance = soaks(algorithm), random.Random(algorithm)
    assert {"metrics.jsonl", "eval.json", "sentinels.json"} <= soak.whole.keys()
    assert any(name.endswith("policy.safetensors") for name in soak.whole)
    assert soak.counts.keys() == set(KINDS)
    # a resumed run has less to do: it may end before it comes to its point
    first, second = chance.sample(KINDS, 2)
    points = Point(first, soak.counts[first] * 2 // 3), Point(second, chance.randint(1, soak.counts[second] // 3))
    assert soak.killed("killed", *points) == []


def no_room(_: Path) -> None:
    """As a full disk: the next checkpoint is longer than any file may become."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def forbid(out: Path) -> None:
    """As a folder that has become read-only, also for an administrator."""
    out.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize(
    ("action", "said"), [(no_room, "is full: nothing written before was lost"), (forbid, "Permission denied")]
)
def test_a_folder_that_cannot_be_written_any_more_costs_nothing(
    action: Callable[[Path], None], said: str, soaks: Uninterrupted
) -> None:
    soak = soaks("grpo")
    out = soak.folder / action.__name__
    halfway = Point("forward", soak.counts["forward"] // 2, action)
    assert launch(words("grpo", soak.files, out), out, halfway) == 2
    log = " ".join((soak.folder / f"{out.name}.log").read_text().split())
    assert said in log and "--resume" in log and "Traceback" not in log
    out.chmod(0o755)
    assert launch(words("grpo", soak.files, out), out) == 0
    assert differences(soak.whole, left(out)) == []
