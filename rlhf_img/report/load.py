"""Reads what a run wrote. Whatever is missing or unreadable becomes a note in the report, never a guess."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError


class Interval(NamedTuple):
    """A mean over `n` values with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The held-out scores of one checkpoint. What was not measured is absent."""

    name: str
    scores: dict[str, Interval] = field(default_factory=dict)
    """`pass_all`, `pass_requirement`, `diversity`."""
    by_check: dict[str, Interval] = field(default_factory=dict)
    rewards: dict[str, Interval] = field(default_factory=dict)
    unscored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`eval.json`: the same held-out prompts before and after."""

    settings: dict[str, Any]
    checkpoints: dict[str, Checkpoint]
    difference: dict[str, Interval]
    """`pass_all`, `pass_requirement`, `diversity_ratio`."""
    reward_difference: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class CardRow:
    """One way to draw images on a distillation's card; the student comes first."""

    checkpoint: Checkpoint
    calls: int
    """Of the network, an image."""
    seconds: float
    """To sample an image, on the run's hardware."""
    memory: int | None
    """Bytes that sampling takes; known on CUDA."""
    colours: dict[str, Interval]
    """`brightness`, `contrast`, `saturation` of its images."""
    distance: float | None
    """Energy distance of its images' law from that of the guided teacher at full steps."""
    chance: float | None
    """What such a distance stays below in 95 of 100 cases if the two laws are one."""
    agreement: Interval | None
    """With the student's image of the same prompt and seed: 1 is the same, 0 as far apart as two seeds."""
    student_minus: dict[str, Interval]
    """The student minus this, paired by prompt: `pass_all`, `pass_requirement`, `diversity_ratio`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """`card.json`: a distilled student beside what it was made from."""

    rows: tuple[CardRow, ...]
    kept: Interval | None
    """The student's pass rate over that of its guided teacher at full steps."""
    gain_kept: Interval | None
    """The share of the teacher's gain over the model before alignment that the student has."""
    memory: int | None
    """The most bytes that the run's process has held."""
    sheet: Path
    """A picture: a line a prompt, a column a row, from the same noise."""


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One requirement of a sample and its verdict; None: the judge could not tell."""

    id: str
    text: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a fixed prompt and seed."""

    image: Path
    prompt: str
    seed: int
    rewards: dict[str, float | None]
    requirements: tuple[Requirement, ...]
    defects: dict[str, float]
    """What the artifact reward holds against it, with probabilities, the likeliest first; empty if it was not asked."""
    heat: Path | None
    """The image under the artifact reward's heat map, where it said broken."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run directory holds and a report shows."""

    path: Path
    config: dict[str, Any]
    metrics: dict[str, list[float | None]]
    """Each metric over the steps; None where a step did not report it."""
    evaluation: Evaluation | None
    card: Card | None
    samples: dict[str, tuple[Sample, ...]]
    """Samples by tag, in order of training: "before", "step_000020", ..., "after"."""
    notes: tuple[str, ...]


def load_run(path: Path) -> Run:
    """The run in `path`.

    Raises RlhfImgError if the folder is missing or holds no run at all.
    """
    expected = ("config.yaml", "metrics.jsonl", "eval.json", "portability.json", "samples")
    if not any((path / name).exists() for name in expected):
        raise RlhfImgError(f"{path} is no run directory: expected at least one of {', '.join(expected)} in it")
    notes: list[str] = []
    return Run(
        path=path,
        config=_load_config(path, notes),
        metrics=_load_metrics(path, notes),
        evaluation=_load_evaluation(path, notes),
        card=_load_card(path, notes),
        samples=_load_samples(path, notes),
        notes=tuple(notes),
    )


def _load_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return load_yaml(path / "config.yaml")
    except RlhfImgError as error:
        notes.append(f"What was run is not known: {error}")
        return {}


def _load_metrics(path: Path, notes: list[str]) -> dict[str, list[float | None]]:
    file = path / "metrics.jsonl"
    if not file.exists():
        notes.append("There is no metrics.jsonl, so there are no curves and no times.")
        return {}
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(dict(json.loads(line)))
        except (json.JSONDecodeError, TypeError, ValueError):
            notes.append(f"metrics.jsonl, line {number}, is not a JSON object and was left out.")
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: [_number(record.get(key)) for record in records] for key in keys}


def _load_evaluation(path: Path, notes: list[str]) -> Evaluation | None:
    raw = load_json(path / "eval.json", notes, "so whether the run helped was not measured")
    if not isinstance(raw, dict):
        return None
    checkpoints = {str(entry["name"]): _checkpoint(entry) for entry in raw.get("checkpoints", [])}
    difference = raw.get("difference") or {}
    settings = {key: value for key, value in raw.items() if key not in ("checkpoints", "difference")}
    return Evaluation(
        settings=settings,
        checkpoints=checkpoints,
        difference=intervals({key: value for key, value in difference.items() if key != "rewards"}),
        reward_difference=intervals(difference.get("rewards")),
    )


def _checkpoint(entry: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        name=str(entry["name"]),
        scores=intervals({key: entry.get(key) for key in ("pass_all", "pass_requirement", "diversity")}),
        by_check=intervals(entry.get("by_check")),
        rewards=intervals(entry.get("rewards")),
        unscored={key: int(count) for key, count in (entry.get("unscored") or {}).items()},
    )


def _load_card(path: Path, notes: list[str]) -> Card | None:
    if not (path / "card.json").exists():
        return None  # only a distillation has one
    raw = load_json(path / "card.json", notes, "so the student is not compared with its teacher")
    if not isinstance(raw, dict):
        return None
    rows = [
        CardRow(
            checkpoint=_checkpoint(entry),
            calls=int(entry["calls"]),
            seconds=float(entry["seconds"]),
            memory=entry.get("memory"),
            colours=intervals(entry.get("colours")),
            distance=_number((entry.get("distance") or {}).get("value")),
            chance=_number((entry.get("distance") or {}).get("chance")),
            agreement=intervals({"agreement": entry.get("agreement")}).get("agreement"),
            student_minus=intervals(entry.get("student_minus")),
        )
        for entry in raw["rows"]
    ]
    shares = intervals({key: raw.get(key) for key in ("kept", "gain_kept")})
    return Card(
        rows=tuple(rows), kept=shares.get("kept"), gain_kept=shares.get("gain_kept"), memory=raw.get("memory"),
        sheet=path / "card.png",
    )  # fmt: skip


def _load_samples(path: Path, notes: list[str]) -> dict[str, tuple[Sample, ...]]:
    folders = [entry for entry in (path / "samples").glob("[!.]*") if entry.is_dir()]
    if not folders:
        notes.append("There are no sample images.")
    order = {"before": (0, ""), "after": (2, "")}
    result = {}
    for folder in sorted(folders, key=lambda f: order.get(f.name, (1, f.name))):
        raw = load_json(folder / "samples.json", notes, "so its images are not shown")
        if isinstance(raw, list):
            result[folder.name] = tuple(_sample(folder, entry) for entry in raw)
    return result


def _sample(folder: Path, raw: dict[str, Any]) -> Sample:
    requirements = raw.get("requirements") or []
    defects = raw.get("defects") or {}
    return Sample(
        # Only the name: a run directory from elsewhere must not make us read other files.
        image=folder / Path(str(raw["file"])).name,
        prompt=str(raw["prompt"]),
        seed=int(raw["seed"]),
        rewards={key: _number(value) for key, value in (raw.get("rewards") or {}).items()},
        requirements=tuple(
            Requirement(id=str(r["id"]), text=str(r.get("text") or r["id"]), passed=r.get("passed"))
            for r in requirements
        ),
        defects={str(name): float(p) for name, p in (defects.get("probability") or {}).items()},
        heat=folder / Path(str(defects["heat"])).name if defects.get("heat") else None,
    )


def load_json(file: Path, notes: list[str], consequence: str) -> Any:
    name = f"{file.parent.name}/{file.name}"
    if not file.exists():
        notes.append(f"There is no {name}, {consequence}.")
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        notes.append(f"{name} is not JSON ({error}), {consequence}.")
        return None


def intervals(raw: dict[str, Any] | None) -> dict[str, Interval]:
    """The entries that were measured; one with a null in it was not."""
    result = {}
    for key, value in (raw or {}).items():
        numbers = [_number((value or {}).get(part)) for part in ("mean", "low", "high")]
        mean, low, high = numbers
        if mean is not None and low is not None and high is not None:
            result[key] = Interval(mean, low, high, int(value.get("n") or 0))
    return result


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
