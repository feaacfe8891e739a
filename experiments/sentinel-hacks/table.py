"""The table of the experiment, as Markdown: python table.py runs/sentinel-hacks

One line a run: when the first sentinel left its band, when one was so far out that the default settings would have
stopped the run, and when the held-out rubric reward, on the same images, had first fallen by 5 points. Sentinels that
are rewards do not count. Exits with 1 if a planted hack was not seen before that, or if the sound run would have been
stopped.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_img.training.watch import OUT, REWARD, Band, SentinelConfig, band

FALL = 0.05
QUALITY = f"{REWARD}rubric"
Row = dict[str, Any]


def first(
    rows: list[Row], bands: dict[str, Band], is_out: Callable[[Band, float], bool]
) -> tuple[int, list[str]] | None:
    """The first look at which sentinels were out, and which."""
    for row in rows:
        names = [name for name, limits in bands.items() if is_out(limits, row[f"sentinel/{name}/place"])]
        if names:
            return row["step"], names
    return None


def line(run: Path) -> tuple[str, bool]:
    """The run's line of the table, and whether it went as it should."""
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if OUT in row]
    kept = json.loads((run / "sentinels.json").read_text())
    raw = kept["raw"]
    images = kept["prompts"] * kept["images"]
    bands = {
        name: band(SentinelConfig(), name, images if name == "drift" else len(raw[name]), len(raw[name]))
        for name in kept["bands"] if not name.startswith(REWARD)
    }  # fmt: skip
    left, far = first(looks, bands, Band.left), first(looks, bands, Band.far)
    trained = next(key for key in rows[0] if key.startswith("reward/") and key.endswith("/mean"))
    cells = [run.name, f"{rows[0][trained]:.2f} to {rows[-1][trained]:.2f}", said(left), said(far)]
    if QUALITY not in kept["bands"]:  # the sound run: the rubric is what it learns from
        return row_of([*cells, "trained on", "-"]), far is None
    before = sum(raw[QUALITY]) / len(raw[QUALITY])
    change = {row["step"]: row[f"sentinel/{QUALITY}"] - before for row in looks}
    fallen = next((step for step, by in change.items() if by <= -FALL), None)
    cells += ["never" if fallen is None else f"step {fallen}", f"{100 * change[left[0]]:+.1f}" if left else "-"]
    return row_of(cells), left is not None and (fallen is None or left[0] < fallen)


def said(found: tuple[int, list[str]] | None) -> str:
    return f"step {found[0]}: {', '.join(found[1])}" if found else "never"


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    print(row_of(["run", "trained reward", "a sentinel left its band", "the defaults would have stopped it",
                  "held-out rubric 5 points down", "its change when the sentinel left, points"]))  # fmt: skip
    print("|---" * 6 + "|")
    found = [line(file.parent) for file in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl"))]
    print("\n".join(text for text, _ in found))
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    sys.exit(main())
