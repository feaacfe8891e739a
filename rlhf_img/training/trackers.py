"""Metrics to a tracker of accelerate's, beside metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.training.rundir import explained

NONE = "none"


def check_name(name: str) -> None:
    """Raises RlhfImgError for a tracker that accelerate does not know."""
    if name != NONE and name not in LOGGER_TYPE_TO_CLASS:
        raise RlhfImgError(f'there is no tracker "{name}"; {did_you_mean(name, [NONE, *LOGGER_TYPE_TO_CLASS])}')


class Tracker:
    """A tracker by name; "none" logs nothing. A context manager."""

    def __init__(self, name: str, folder: Path) -> None:
        """Raises RlhfImgError for a tracker that accelerate does not know or whose package is not installed."""
        self._tracker: GeneralTracker | None = None
        self._folder = folder
        if name == NONE:
            return
        check_name(name)
        cls = LOGGER_TYPE_TO_CLASS[name]
        try:
            where = {"logging_dir": str(folder / "trackers")} if cls.requires_logging_directory else {}
            self._tracker = cls("rlhf-img", **where)
            self._tracker.start()
        except ImportError as error:
            raise RlhfImgError(f'the tracker "{name}" needs a package that is not installed: {error}') from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._tracker is not None:
            with explained(self._folder):
                self._tracker.log(dict(metrics), step=step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.finish()
