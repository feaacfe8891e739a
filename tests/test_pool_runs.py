"""The prompt pool from the command line, and in runs that are killed and resumed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_training import arguments, files, lines, run, state
from tiny import PROMPTS
from typer.testing import CliRunner

from rlhf_img.cli.main import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.training.pool.run import PromptPool
from rlhf_img.training.pool.store import PoolFile
from rlhf_img.training.pool.weights import Group
from rlhf_img.training.prompts import read_prompts

__all__ = ["files"]  # the fixture


def call(*words: object) -> str:
    result = CliRunner().invoke(app, ["prompts", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_killed_between_checkpoint_and_pool_it_ends_as_if_uninterrupted_and_each_group_counts_once(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "steps=4", "pool.curriculum=true"
    pools = [tmp_path / "whole.sqlite", tmp_path / "killed.sqlite"]
    for pool in pools:
        call("add", pool, files / "prompts.txt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(monkeypatch, [*arguments(files, whole, *more), "--prompts", str(pools[0])]) == 0

    publish, calls = PromptPool.publish, []

    def dies(self: PromptPool) -> None:
        calls.append(len(calls))
        if len(calls) == 3:  # at the start, after the first checkpoint, after the second
            raise KeyboardInterrupt
        publish(self)

    with monkeypatch.context() as patched:
        patched.setattr(PromptPool, "publish", dies)
        assert run(patched, [*arguments(files, killed, *more), "--prompts", str(pools[1])]) == 130
    assert PoolFile(pools[1]).clock == 1  # never ahead of the checkpoint, which is of step 2
    PoolFile(pools[1]).add([("one more, which the run began without", None)], "test")
    assert run(monkeypatch, ["grpo", "--out", str(killed), "--resume"]) == 0
    assert lines(killed) == lines(whole) and state(killed) == state(whole)
    assert "pool/effective" in lines(whole)[0] and "pool" in (whole / "report.html").read_text()
    one, other = (PoolFile(pool).statistics(range(1, len(PROMPTS) + 1)) for pool in pools)
    for name in ("groups", "score", "variance", "flat", "last"):
        np.testing.assert_array_equal(getattr(one, f"{name}_N"), getattr(other, f"{name}_N"))
    assert one.groups_N.sum() == 8 and PoolFile(pools[1]).clock == 4


def test_prompts_come_from_datasets_and_pools(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Prompt": ["a cat", None, " ", "a dog"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.table({"prompt": ["a bird", "a dog"]})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)  # as `datasets` saves them
    pool = tmp_path / "p.sqlite"
    call("add", pool, tmp_path / "a.parquet", "--column", "Prompt")
    assert json.loads(call("add", pool, folder, "--json")) == [{"source": str(folder), "added": 1, "known": 1}]
    assert [p.text for p in read_prompts(pool)] == ["a cat", "a dog", "a bird"]
    for path, column, message in (
        (tmp_path / "a.parquet", "prompt", 'no column "prompt"; did you mean "Prompt"'),
        (tmp_path / "a.parquet", "n", "holds int64 and no text"),
        (tmp_path, "prompt", 'no column "prompt"'),
        (files_of_nothing(tmp_path), "prompt", "no .parquet or .arrow file"),
        (broken(tmp_path), "prompt", "no readable dataset"),
    ):
        with pytest.raises(RlhfImgError, match=message):
            read_prompts(path, column)


def files_of_nothing(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def broken(folder: Path) -> Path:
    (folder / "b.parquet").write_bytes(b"PAR1 not at all")
    return folder / "b.parquet"


def test_a_rubric_goes_through_the_pool_unchanged(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        'version: 1\nprompt: a sign "NO"\nrequirements:\n  - {id: sign, check: text, target: sign, equals: "NO"}\n'
        "gates: [{reward: artifact, below: 0.35, cap: 0.2}]\n"
    )
    call("add", tmp_path / "p.sqlite", tmp_path / "r.yaml")
    assert read_prompts(tmp_path / "p.sqlite") == read_prompts(tmp_path / "r.yaml")


def filled(path: Path) -> PoolFile:
    """Eight prompts, of which the first is solved, the second hopeless, and the third in between."""
    (path.parent / "eight.txt").write_text("\n".join(f"{n} {what} on grey" for n in ("two", "three")
                                                     for what in ("cats", "dogs", "red stars", "blue crosses")))
    call("add", path, path.parent / "eight.txt")
    file = PoolFile(path)
    shown = {1: Group(0.99, 0.0, True), 2: Group(0.01, 0.0, True), 3: Group(0.5, 0.09, False)}
    file.publish("run", 3, [(step, id, group) for step in (1, 2, 3) for id, group in shown.items()])
    return file


def test_stats_say_what_is_known(tmp_path: Path) -> None:
    file = filled(tmp_path / "p.sqlite")
    file.retire({8: "by hand"})
    found = json.loads(call("stats", file.path, "--json"))
    assert (found["prompts"], found["active"], found["seen"], found["groups"]) == (8, 7, 3, 9)
    assert found["retired"] == {"by hand": 1} and found["resting"] == 2 and found["iterations"] == 3
    assert found["difficulty"]["median"] == 0.5 and found["spread"]["highest"] == pytest.approx(0.3)
    assert found["hardest"][0] == "two dogs on grey" and found["widest_spread"][0] == "two red stars on grey"
    assert 1 < found["effective"] <= 5
    assert "two dogs on grey" in call("stats", file.path)


def test_retire_and_back(tmp_path: Path) -> None:
    file = filled(tmp_path / "p.sqlite")
    assert call("retire", file.path, "--solved", 0.98, "--hopeless", 0.02) == "2 prompts retired\n"
    assert [e.retired for e in file.entries(retired=True)[:3]] == ["solved", "hopeless", None]
    assert call("retire", file.path, "--solved", 0.98, "--groups", 4) == "0 prompts retired\n"
    (tmp_path / "some.txt").write_text("Two Cats on grey.\nthree cats on grey\n")
    assert call("retire", file.path, "--prompts", tmp_path / "some.txt") == "1 prompts retired\n"
    assert call("retire", file.path, "--back", "--prompts", tmp_path / "some.txt") == "2 prompts brought back\n"
    assert json.loads(call("retire", file.path, "--back", "--json")) == {"prompts": 1, "back": True}
    assert len(file.entries()) == 8
    with pytest.raises(RlhfImgError, match="which prompts"):
        call("retire", file.path)


def test_dedup_retires_what_repeats_and_can_only_say_so(tmp_path: Path) -> None:
    file = filled(tmp_path / "p.sqlite")
    file.add([("two cats, on grey", None)], "test")
    assert "1 of 9 prompts would be retired" in call("dedup", file.path, "--similarity", 0.6, "--dry-run")
    assert len(file.entries()) == 9
    said = json.loads(call("dedup", file.path, "--similarity", 0.6, "--json"))
    assert said == [{"retired": "two cats, on grey", "kept": "two cats on grey"}]
    assert [e.retired for e in file.entries(retired=True)][-1] == "duplicate" and len(file.entries()) == 8


def test_coverage_divides_the_pool_once_and_shows_every_prompt(tmp_path: Path) -> None:
    file = filled(tmp_path / "p.sqlite")
    views = json.loads(call("coverage", file.path, "--clusters", 3, "--json"))
    assert 1 < len(views) <= 3 and sum(v["prompts"] for v in views) == 8
    assert sum(v["share"] for v in views) == pytest.approx(1) == sum(v["drawn"] for v in views)
    assert sum(v["groups"] for v in views) == 9 and all(v["words"] for v in views)
    assert json.loads(call("coverage", file.path, "--json")) == views  # divided already
    assert "█" in call("coverage", file.path)


def test_a_pool_s_name_and_the_playground(tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match="a pool's name ends with .sqlite"):
        call("add", tmp_path / "pool.db", "playground")
    said = json.loads(call("add", tmp_path / "p.sqlite", "playground", "playground:heldout", "--count", 20, "--json"))
    assert [one["added"] + one["known"] for one in said] == [20, 20] and said[0]["added"] == 20
