"""`portability.json` as a report shows it: what becomes of LoRAs on another checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_img.report.images import data_uri
from rlhf_img.report.load import Interval, intervals, load_json

_LARGEST = 1024
"""Longest side of the sheet of images in pixels."""


@dataclass(frozen=True, kw_only=True)
class Strength:
    """A LoRA at one strength on the other model: `cosine`, `magnitude`, `target`, `fidelity`."""

    scale: float
    values: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class PortedLora:
    """A LoRA on both models. What was not measured is absent."""

    name: str
    kind: str
    verdict: str
    values: dict[str, Interval]
    """`cosine`, `cosine_each`, `ceiling`, `magnitude`, `target_kept`."""
    target: dict[str, Interval]
    """Model with or without the LoRA -> how far it does what the LoRA is for."""
    fidelity: dict[str, Interval]
    """The same -> share of single requirements met."""
    curve: tuple[Strength, ...]
    quality: dict[str, Interval]
    """All requirements met on other prompts: `without`, `with`, `difference`."""
    weights: dict[str, float | None]
    sheet: str | None
    """A data URI: a line a prompt; without and with the LoRA, on the one model, then on the other."""


@dataclass(frozen=True, kw_only=True)
class Ported:
    """The whole measurement."""

    source: str
    turbo: str
    threshold: float
    loras: tuple[PortedLora, ...]


def load_ported(path: Path, notes: list[str]) -> Ported | None:
    """What the folder of a run holds of it; None if it was not measured."""
    if not (path / "portability.json").exists():
        return None
    raw = load_json(path / "portability.json", notes, "so the portability of LoRAs is not shown")
    if not isinstance(raw, dict):
        return None
    return Ported(
        source=str(raw["from"]), turbo=str(raw["to"]), threshold=float(raw["threshold"]),
        loras=tuple(_lora(path, entry) for entry in raw["loras"]),
    )  # fmt: skip


def _lora(path: Path, raw: dict[str, Any]) -> PortedLora:
    quality = raw.get("quality") or {}
    return PortedLora(
        name=str(raw["name"]),
        kind=str(raw.get("kind") or ""),
        verdict=str(raw["verdict"]),
        values=_some(raw, "cosine", "cosine_each", "ceiling", "magnitude", "target_kept"),
        target=intervals(raw.get("target")),
        fidelity=intervals(raw.get("fidelity")),
        curve=tuple(
            Strength(scale=float(row["scale"]), values=_some(row, "cosine", "magnitude", "target", "fidelity"))
            for row in raw["curve"]
        ),
        quality=intervals({name: (quality.get(name) or {}).get("pass_all")
                           for name in ("without", "with", "difference")}),
        weights=dict(raw["weights"]),
        # Only beside the file, whatever the name says.
        sheet=data_uri(path / f"portability-{Path(str(raw['name'])).name}.png", _LARGEST),
    )  # fmt: skip


def _some(raw: dict[str, Any], *names: str) -> dict[str, Interval]:
    return intervals({name: raw.get(name) for name in names})
