"""The table of an experiment whose runs are FOLDER/WAY-SEED, as Markdown: python experiments/ways.py FOLDER

Changes from before to after on held-out prompts, paired by prompt, with 95 % intervals over prompts; one line a run,
and below them the mean over the seeds of each way. The time is an iteration's median, which what else the machine did
for a while does not change. Measures that no run has are left out; `residual`, where it was measured, is what no run
was trained on: it falls where structure breaks.
"""

import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

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


def seconds(run: Path) -> float:
    """That an iteration took."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return median(float(json.loads(line)["time/step"]) for line in lines)


def main() -> None:
    finished = sorted(path.parent for path in Path(sys.argv[1]).glob("*-*/eval.json"))
    differences = {run: json.loads((run / "eval.json").read_text())["difference"] for run in finished}
    columns = {
        title: given for title, given in COLUMNS.items() if any(found(d, given[0]) for d in differences.values())
    }
    print(f"| run | {' | '.join(columns)} | an iteration, s |")
    print("|---" * (len(columns) + 2) + "|")
    for run, difference in differences.items():
        cells = [cell(found(difference, path), scale) for path, scale in columns.values()]
        print(f"| {run.name} | {' | '.join(cells)} | {seconds(run):.1f} |")
    for way in dict.fromkeys(run.name.rsplit("-", 1)[0] for run in finished):
        runs = [run for run in finished if run.name.rsplit("-", 1)[0] == way]
        cells = []
        for path, scale in columns.values():
            known = [one["mean"] for run in runs if (one := found(differences[run], path)) is not None]
            cells.append(f"{scale * mean(known):+.3f}" if known else "-")
        print(f"| {way}, mean of {len(runs)} | {' | '.join(cells)} | {mean(map(seconds, runs)):.1f} |")


if __name__ == "__main__":
    main()
