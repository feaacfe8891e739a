"""The run directory: one folder that says what was run, holds its state, and is whole whenever the run is killed."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import yaml

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError

_STEP = re.compile(r"step_(\d{6,})")
_HIDDEN = ".partial-"
"""Prefix of a file or folder that is being written or thrown away; it is swept up when the run is opened next."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a full quota, and a file larger than the process may write."""


class Checkpoint(NamedTuple):
    """A whole checkpoint: the state after optimiser step `step`, counted from 1."""

    step: int
    path: Path


class RunDir:
    """An opened run directory; while it is open, nobody else can open it.

    Files and folders appear whole or not at all: they are written beside their place, forced to the disk and renamed.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        """Use `create`. Without a lock, as the further processes of a run have it, nothing is written."""
        self.path = path
        self._lock = lock
        self._writes = lock is not None

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> "RunDir":
        """Opens `path` for a new run, or with `resume` for the run that is in it.

        Raises RlhfImgError: the folder cannot be written, holds a run already (or none, with `resume`), or is in use.
        """
        is_run = (path / "config.yaml").exists() or (path / "metrics.jsonl").exists() or (path / "checkpoints").exists()
        if is_run and not resume:
            raise RlhfImgError(f"{path} already holds a run: continue it with --resume, or give another --out")
        if resume and not is_run:
            raise RlhfImgError(f"{path} holds no run to resume: give a run's folder to --out, or drop --resume")
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 32).decode() or "unknown"
            os.close(lock)
            raise RlhfImgError(
                f"{path} is in use by another run (process {holder}): wait for it, or give another --out"
            ) from error
        with explained(path):
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        run = cls(path, lock)
        run._sweep()
        return run

    @classmethod
    def follow(cls, path: Path) -> "RunDir":
        """The run directory that another process of the same run has opened: read, never written."""
        return cls(path, None)

    def close(self) -> None:
        """Lets others open the folder. Closing twice is allowed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_config(self, mapping: Mapping[str, Any]) -> None:
        """`config.yaml`: algorithm, command, config, versions, seed."""
        self._write_text("config.yaml", yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True))

    def read_config(self) -> dict[str, Any]:
        return load_yaml(self.path / "config.yaml")

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file such as `eval.json`; NaN and infinities become null, which means "not known"."""
        self._write_text(name, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`. Steps count from 1; NaN and infinities become null."""
        if not self._writes:
            return
        line = json.dumps({"step": step, **_finite(dict(metrics))}, ensure_ascii=False) + "\n"
        path = self.path / "metrics.jsonl"
        with explained(self.path), open(path, "ab") as file:
            before = file.tell()
            try:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, before)  # half a line would end the file where the disk did
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; none if there is no such file."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step`, so that a resumed run writes the file that an uninterrupted one would."""
        path = self.path / "metrics.jsonl"
        if not path.exists() or not self._writes:
            return
        kept: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run was killed
            if record["step"] <= step:
                kept.append(line)
        self._write_text("metrics.jsonl", "".join(kept))

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], *, keep_last: int = 2, keep: Checkpoint | None = None
    ) -> Path:
        """`checkpoints/step_000123`, made by `write(folder)`; then all but the `keep_last` newest and `keep` are
        deleted.

        Every process of a run calls this, and on each `write` is called, perhaps before the first has made the folder.
        Whatever goes wrong in `write`, the checkpoints that were there stay.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        path = self._write_folder(self.path / "checkpoints" / f"step_{step:06d}", write, together=True)
        self.rotate_checkpoints(keep_last, keep)
        return path

    def rotate_checkpoints(self, keep_last: int, keep: Checkpoint | None = None) -> None:
        """Deletes all but the `keep_last` newest and `keep`, also what a killed run had no time to delete."""
        for old in self.checkpoints()[:-keep_last] if self._writes else []:
            if old != keep:
                self._discard(old.path)

    def checkpoints(self) -> list[Checkpoint]:
        """Every whole checkpoint, oldest first."""
        folder = self.path / "checkpoints"
        entries = folder.iterdir() if folder.exists() else iter(())
        found = [(_STEP.fullmatch(entry.name), entry) for entry in entries]
        return sorted(Checkpoint(int(match[1]), entry) for match, entry in found if match)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        return max(self.checkpoints(), default=None)

    def save_samples(self, tag: str, write: Callable[[Path], None]) -> Path:
        """`samples/<tag>`, made by `write(folder)`: images and their samples.json. An older one is replaced."""
        return self._write_folder(self.path / "samples" / tag, write)

    def save_best(self, write: Callable[[Path], None]) -> Path:
        """`best`, made by `write(folder)` as a checkpoint is: what was best on a validation panel so far. An older one
        is replaced."""
        return self._write_folder(self.path / "best", write, together=True)

    def write_image(self, name: str, png: bytes) -> None:
        """A PNG file such as `card.png`."""
        self._write(name, png)

    def _write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        if not self._writes:
            return
        target = self.path / name
        hidden = target.with_name(_HIDDEN + target.name)
        with explained(self.path):
            try:
                with open(hidden, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(hidden, target)
            except BaseException:
                hidden.unlink(missing_ok=True)
                raise
            _sync(self.path)

    def _write_folder(self, target: Path, write: Callable[[Path], None], *, together: bool = False) -> Path:
        hidden = target.with_name(_HIDDEN + target.name)
        with explained(self.path):
            if not self._writes:
                if together:
                    write(hidden)
                return target
            hidden.mkdir(parents=True)
            try:
                write(hidden)
                for entry in (hidden, *hidden.rglob("*")):
                    _sync(entry)
                if target.exists():
                    self._discard(target)
                hidden.rename(target)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            _sync(target.parent)
        return target

    def _discard(self, path: Path) -> None:
        """Deletes a folder so that no half of it is ever seen under its name."""
        hidden = path.with_name(f"{_HIDDEN}old-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)

    def _sweep(self) -> None:
        """Removes what a killed run was writing or deleting."""
        with explained(self.path):
            for folder in (self.path, self.path / "checkpoints", self.path / "samples", self.path / "lora"):
                for entry in list(folder.glob(f"{_HIDDEN}*")):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a file system's refusals into errors that say what to do; other errors pass."""
    try:
        yield
    except Exception as error:
        # torch and safetensors report a full disk in exceptions of their own, as text.
        full = isinstance(error, OSError) and error.errno in _FULL
        if full or any(os.strerror(number) in str(error) for number in _FULL):
            raise RlhfImgError(
                f"the disk that holds {path} is full: nothing written before was lost; "
                "make room there and go on with --resume"
            ) from error
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise RlhfImgError(
                f"{path} cannot be written: {reason}: make it writable and go on with --resume, or give another folder "
                "to --out"
            ) from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinities, for which JSON has no words."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
