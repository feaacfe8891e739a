"""The run directory: atomic, locked, and the same after a kill as without one."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_img.errors import RlhfImgError
from rlhf_img.training.rundir import RunDir


def state(text: str = "state") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state.txt").write_text(text)

    return write


def test_a_new_run_writes_what_is_read_back(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "deep" / "run") as run:
        run.write_config({"algorithm": "grpo", "seed": 0, "config": {"lr": 1e-4}})
        assert run.read_config() == {"algorithm": "grpo", "seed": 0, "config": {"lr": 1e-4}}
        run.append_metrics(1, {"loss": 0.5, "kl": float("nan"), "tags": {"a": float("inf")}})
        run.write_json("eval.json", {"mean": float("nan"), "n": 3})
        line = json.loads((run.path / "metrics.jsonl").read_text())
        assert line == {"step": 1, "loss": 0.5, "kl": None, "tags": {"a": None}}
        assert json.loads((run.path / "eval.json").read_text()) == {"mean": None, "n": 3}


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    with RunDir.create(tmp_path) as run:
        run.write_config({"seed": 0})
    with pytest.raises(RlhfImgError, match="already holds a run: continue it with --resume"):
        RunDir.create(tmp_path)
    RunDir.create(tmp_path, resume=True).close()
    with pytest.raises(RlhfImgError, match="holds no run to resume"):
        RunDir.create(tmp_path / "empty", resume=True)


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    with RunDir.create(tmp_path) as run:
        run.write_config({})
        with pytest.raises(RlhfImgError, match=rf"in use by another run \(process {os.getpid()}\)"):
            RunDir.create(tmp_path, resume=True)
    RunDir.create(tmp_path, resume=True).close()


def test_an_unwritable_out_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RlhfImgError, match="cannot be written: .*give another folder to --out"):
        RunDir.create(tmp_path / "file" / "run")


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    with RunDir.create(tmp_path) as run:
        assert run.latest_checkpoint() is None
        for step in (9, 10, 100, 1_000_000):
            run.save_checkpoint(step, state(str(step)), keep_last=2)
        assert [c.step for c in run.checkpoints()] == [100, 1_000_000]
        latest = run.latest_checkpoint()
        assert latest is not None and (latest.path / "state.txt").read_text() == "1000000"
        run.save_checkpoint(100, state("again"))
        assert (tmp_path / "checkpoints" / "step_000100" / "state.txt").read_text() == "again"
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000100", "step_1000000"]


def test_a_good_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    with RunDir.create(tmp_path) as run:
        good = None
        for step in range(1, 7):
            run.save_checkpoint(step, state(), keep_last=1, keep=good)
            good = run.latest_checkpoint() if step in (1, 3) else good
        assert [c.step for c in run.checkpoints()] == [3, 6]
        run.save_checkpoint(7, state(), keep_last=5)  # killed before it could delete, with keep_last=1
    with RunDir.create(tmp_path, resume=True) as run:
        run.rotate_checkpoints(1, good)
        assert [c.step for c in run.checkpoints()] == [3, 7]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_costs_only_the_new_checkpoint(tmp_path: Path, error: Exception) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with RunDir.create(tmp_path) as run:
        run.save_checkpoint(1, state("good"), keep_last=1)
        with pytest.raises(RlhfImgError, match=r"is full: nothing written before was lost; make room there"):
            run.save_checkpoint(2, fill, keep_last=1)
        assert [c.step for c in run.checkpoints()] == [1]
        assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDir.create(tmp_path) as run:
        run.append_metrics(1, {"loss": 1.0})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RlhfImgError, match="is full"):
            run.append_metrics(2, {"loss": 1.0})
        with pytest.raises(RlhfImgError, match="is full"):
            run.write_json("eval.json", {})
        monkeypatch.undo()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
        assert sorted(os.listdir(tmp_path)) == [".lock", "metrics.jsonl"]


def test_a_fault_in_the_state_is_not_hidden(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise ZeroDivisionError

    with RunDir.create(tmp_path) as run, pytest.raises(ZeroDivisionError):
        run.save_checkpoint(1, fail)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_resumed_metrics_equal_uninterrupted_ones(tmp_path: Path) -> None:
    def log(run: RunDir, first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.append_metrics(step, {"loss": 1 / step})

    with RunDir.create(tmp_path / "whole") as run:
        log(run, 1, 6)
    with RunDir.create(tmp_path / "killed") as run:
        log(run, 1, 3)
        run.save_checkpoint(3, state())
        log(run, 4, 5)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed within the line
    (tmp_path / "killed" / "checkpoints" / ".partial-step_000006").mkdir()
    with RunDir.create(tmp_path / "killed", resume=True) as run:
        latest = run.latest_checkpoint()
        assert latest is not None
        run.truncate_metrics(latest.step)
        log(run, latest.step + 1, 6)
        assert os.listdir(tmp_path / "killed" / "checkpoints") == ["step_000003"]
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_samples_of_a_tag_are_replaced_whole(tmp_path: Path) -> None:
    with RunDir.create(tmp_path) as run:
        run.save_samples("after", lambda folder: (folder / "old.png").touch())
        path = run.save_samples("after", lambda folder: (folder / "new.png").touch())
    assert os.listdir(path) == ["new.png"]
