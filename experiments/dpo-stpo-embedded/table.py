"""The tables of this experiment, from runs' own files; and how long GRPO from Raw must be for equal compute.

    python table.py tables FOLDER          prints both tables as Markdown
    python table.py steps FOLDER SEED N    iterations that Raw gets when GRPO from the STPO run gets N
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import yaml

RUN = re.compile(r"(?P<name>.+)-(?P<seed>\d+)")
METHODS = ("dpo", "stpo-mirror", "stpo-guard", "stpo-anchor", "ipo")


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def finished(folder: Path, prefix: str = "") -> list[tuple[str, int, Path]]:
    """Name, seed and folder of every finished run whose name begins so."""
    found = []
    for file in sorted(folder.glob("*/eval.json")):
        if (match := RUN.fullmatch(file.parent.name)) and match["name"].startswith(prefix):
            found.append((match["name"], int(match["seed"]), file.parent))
    return found


def points(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:+.1f} ({100 * value['low']:+.1f} to {100 * value['high']:+.1f})"


def ratio(value: dict[str, Any]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def seconds(run: Path) -> float:
    return sum(row["time/step"] for row in read_lines(run))


def preference_table(folder: Path) -> list[str]:
    """One row a run on pairs: held-out gain, both errors against the reference, fine detail, variety."""
    lines = [
        "| loss | steps | seed | requirements all met, points | winners' error | losers' error | pairs told apart | "
        "fine detail / Raw | diversity / Raw | beta | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, seed, run in finished(folder):
        method = name.removesuffix("-long")
        if method not in METHODS:
            continue
        difference = json.loads((run / "eval.json").read_text())["difference"]
        seen = [row for row in read_lines(run) if "heldout/winner_rise" in row][-1]
        steps = yaml.safe_load((run / "config.yaml").read_text())["config"]["steps"]
        rows.append((steps, METHODS.index(method), seed, (
            f"| {method} | {steps} | {seed} | {points(difference['pass_all'])} "
            f"| {100 * seen['heldout/winner_rise']:+.1f} % | {100 * seen['heldout/loser_rise']:+.1f} % "
            f"| {100 * seen['heldout/accuracy']:.0f} % "
            f"| {ratio(difference['high_freq_ratio'])} | {ratio(difference['diversity_ratio'])} "
            f"| {seen['beta_mean']:.0f} | {seconds(run):.0f} |"
        )))  # fmt: skip
    return lines + [text for *_, text in sorted(rows)]


def rl_table(folder: Path) -> list[str]:
    """One row a GRPO run: from Raw, and from the STPO run, whose training counts for it; both measured against Raw."""
    lines = [
        "| GRPO from | seed | iterations | s, with what came before | requirements all met | against Raw, points | "
        "fine detail / Raw |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, seed, run in finished(folder, "grpo-"):
        start = yaml.safe_load((run / "config.yaml").read_text())["config"]["start"]
        begun = None if start is None else folder / Path(start).name  # the folder may have been moved as a whole
        before = 0.0 if begun is None else seconds(begun)
        raw = json.loads((begun or run).joinpath("eval.json").read_text())["checkpoints"][0]
        after = json.loads((run / "eval.json").read_text())["checkpoints"][1]
        gain = after["pass_all"]["mean"] - raw["pass_all"]["mean"]
        lines.append(
            f"| {'Raw' if start is None else Path(start).name} | {seed} | {len(read_lines(run))} "
            f"| {seconds(run) + before:.0f} | {100 * after['pass_all']['mean']:.1f} % | {100 * gain:+.1f} "
            f"| {after['high_freq']['mean'] / raw['high_freq']['mean']:.3f} |"
        )
    return lines


def equal_steps(folder: Path, seed: int, steps: int) -> int:
    """GRPO's iterations from Raw for the seconds that the STPO run and `steps` iterations from it take together.

    The pairs' making is not counted: they are made once for all runs.
    """
    rl = folder / f"grpo-stpo-{seed}"
    each = seconds(rl) / len(read_lines(rl))
    return steps + math.ceil(seconds(folder / f"stpo-mirror-{seed}") / each)


def main() -> None:
    match sys.argv[1:]:
        case ["tables", folder]:
            print("\n".join([*preference_table(Path(folder)), "", *rl_table(Path(folder))]))
        case ["steps", folder, seed, steps]:
            print(equal_steps(Path(folder), int(seed), int(steps)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
