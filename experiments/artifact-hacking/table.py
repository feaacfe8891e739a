"""The table of the experiment, as Markdown: python table.py runs/artifact-hacking

Changes from before to after on held-out prompts, paired by prompt, with 95 % intervals over prompts; one line a run,
and below them the mean over the seeds of each way. `residual` is the measure that no run was trained on: it falls
where structure breaks.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

WAYS = ("rubric", "summed", "gate")
COLUMNS = {
    "all requirements met, points": (("pass_all",), 100),
    "single requirements met, points": (("pass_requirement",), 100),
    "residual": (("rewards", "residual"), 1),
    "artifact": (("rewards", "artifact"), 1),
    "diversity kept": (("diversity_ratio",), 1),
    "fine detail kept": (("high_freq_ratio",), 1),
}


def found(difference: dict[str, Any], path: tuple[str, ...]) -> dict[str, float] | None:
    """An interval of eval.json, or None where it was not measured."""
    value: Any = difference
    for key in path:
        value = (value or {}).get(key)
    return value if value and value.get("mean") is not None else None


def cell(interval: dict[str, float] | None, scale: float) -> str:
    """A mean with its interval."""
    if interval is None:
        return "-"
    digits = 1 if scale == 100 else 3
    low, high = (f"{scale * interval[key]:.{digits}f}" for key in ("low", "high"))
    return f"{scale * interval['mean']:+.{digits}f} ({low} to {high})"


def main() -> None:
    out = Path(sys.argv[1])
    print(f"| run | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    means = []
    for way in WAYS:
        runs = sorted(out.glob(f"{way}-*/eval.json"))
        differences = [json.loads(run.read_text())["difference"] for run in runs]
        for run, difference in zip(runs, differences, strict=True):
            cells = [cell(found(difference, path), scale) for path, scale in COLUMNS.values()]
            print(f"| {run.parent.name} | {' | '.join(cells)} |")
        cells = []
        for path, scale in COLUMNS.values():
            known = [one["mean"] for difference in differences if (one := found(difference, path)) is not None]
            cells.append(f"{scale * mean(known):+.3f}" if known else "-")
        means.append(f"| {way}, mean of {len(runs)} | {' | '.join(cells)} |")
    print("\n".join(means))


if __name__ == "__main__":
    main()
