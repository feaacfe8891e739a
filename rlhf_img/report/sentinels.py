"""What the sentinels of a run say: where each stands beside its band, and whether the gain can be believed."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_img.report.load import Run

Limits = tuple[float, float]
PLACE = "/place"
EXPLAINED = {
    "saturation": "mean colour saturation",
    "dark_share": "share of almost black pixels",
    "edge_density": "share of pixels on edges",
    "colour_entropy": "bits of colour variety",
    "grid": "peaks at the period of tokens and autoencoder, log10",
    "high_freq": "energy in the finest detail: noise, fine grids",
    "jpeg": "bits a pixel as JPEG: low is empty, high is noise",
    "characters": "characters an image that the prompt does not ask for",
    "diversity": "how different the images of one prompt are",
    "emptied": "images emptier than Raw's of the same seed, less those fuller, as a share",
    "drift": "distance from Raw's image of the same seed; Raw: of another seed",
}


class Sentinel(NamedTuple):
    """One sentinel at the last look. `left`: the step at which it first was outside of its band."""

    name: str
    explained: str
    raw: float | None
    last: float | None
    place: float | None
    band: Limits
    left: int | None

    @property
    def is_out(self) -> bool:
        return self.place is not None and not self.band[0] <= self.place <= self.band[1]


class Transfer(NamedTuple):
    """A held-out reward's gain over that of the rewards trained on; None: they gained too little to divide by."""

    name: str
    mean: float | None
    low: float | None
    high: float | None


class Sentinels(NamedTuple):
    """All of a run's, with the verdict in words."""

    kind: Literal["better", "worse", "unclear"]
    verdict: str
    rows: tuple[Sentinel, ...]
    transfers: tuple[Transfer, ...]


def load_sentinels(run: Run) -> Sentinels | None:
    """What `sentinels.json` and the metrics say; None where nothing was watched."""
    found = _read(run.path / "sentinels.json")
    if found is None or "sentinel/out" not in run.metrics:
        return None
    rows = tuple(
        _sentinel(run, name, limits["warn"], found["raw"].get(name, [])) for name, limits in found["bands"].items()
    )
    kind, verdict = _verdict(run, rows, found.get("stopped"))
    return Sentinels(kind, verdict, rows, tuple(_transfers(run)))


def bands(run: Run) -> dict[str, Limits]:
    """The band of every metric that has one, by its key."""
    found = _read(run.path / "sentinels.json") or {"bands": {}}
    return {f"sentinel/{name}{PLACE}": _limits(limits["warn"]) for name, limits in found["bands"].items()}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _limits(warn: list[float | None]) -> Limits:
    low, high = warn
    return 0.0 if low is None else max(low, 0.0), 1.0 if high is None else min(high, 1.0)


def _sentinel(run: Run, name: str, warn: list[float | None], raw: list[float | None]) -> Sentinel:
    low, high = _limits(warn)
    steps, places = run.metrics["step"], run.metrics.get(f"sentinel/{name}{PLACE}", [])
    known = [(step, place) for step, place in zip(steps, places, strict=False) if place is not None]
    values = [v for v in raw if v is not None]
    last = [v for v in run.metrics.get(f"sentinel/{name}", []) if v is not None]
    return Sentinel(
        name, EXPLAINED.get(name, "held out: not trained on"), sum(values) / len(values) if values else None,
        last[-1] if last else None, known[-1][1] if known else None, (low, high),
        next((int(step or 0) for step, place in known if not low <= place <= high), None),
    )  # fmt: skip


def _verdict(
    run: Run, rows: tuple[Sentinel, ...], stopped: dict[str, Any] | None
) -> tuple[Literal["better", "worse", "unclear"], str]:
    looks = [(int(step or 0), out) for step, out in zip(run.metrics["step"], run.metrics["sentinel/out"], strict=True)]
    inside = [step for step, out in looks if out == 0]
    if stopped:
        kept = f"the last good checkpoint is that of step {stopped['good']}" if stopped["good"] else "none was good"
        return "worse", f"Stopped by a sentinel at step {stopped['step']}: {stopped['why']}; {kept}"
    out = [row.name for row in rows if row.is_out]
    if out:
        last = f"last all inside at step {inside[-1]}" if inside else "never all inside"
        return "worse", f"Sentinels outside of Raw's band: {', '.join(out)} ({last})"
    back = [f"{row.name} (step {row.left})" for row in rows if row.left is not None]
    if back:
        return "unclear", f"Sentinels are inside of Raw's band; on the way these were not: {', '.join(back)}"
    return "better", "All sentinels stayed inside of Raw's band"


def _transfers(run: Run) -> list[Transfer]:
    found = (run.evaluation.settings.get("transfer") if run.evaluation else None) or {}
    return [
        Transfer(name, *((ratio or {}).get(key) for key in ("mean", "low", "high")))
        for name, ratio in (found.get("ratios") or {}).items()
    ]
