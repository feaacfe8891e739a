"""What the recipe has to show, seed by seed, from card.json and portability.json: python table.py FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

WANTED = {
    "pass rate kept, of the guided teacher at full steps": 0.95,
    "points above the teacher at 8 steps without guidance, lower end": 0.0,
    "diversity, of the teacher's": 0.8,
    "lowest cosine of the three LoRAs": 0.7,
}
"""At least."""


def measured(turbo: Path) -> dict[str, float | None]:
    """The four figures, and the minutes that the distillation took; None where one was not measured."""
    card = json.loads((turbo / "card.json").read_text())
    ported = json.loads((turbo / "portability.json").read_text())
    rows: list[dict[str, Any]] = card["rows"]
    teacher = rows[1]
    unguided = next(r for r in rows[1:] if r["name"].startswith("teacher") and r["guidance"] == 0)
    seconds = [json.loads(line)["time/step"] for line in (turbo / "metrics.jsonl").read_text().splitlines()]
    low = unguided["student_minus"]["pass_all"]["low"]
    cosines = [lora["cosine"]["mean"] for lora in ported["loras"]]
    values = (
        card["kept"]["mean"], None if low is None else 100 * low, teacher["student_minus"]["diversity_ratio"]["mean"],
        None if None in cosines else min(cosines),
    )
    return {**dict(zip(WANTED, values, strict=True)), "minutes of distillation": sum(seconds) / 60}


def main() -> None:
    runs = sorted(Path(sys.argv[1]).glob("seed-*/turbo"))
    found = {turbo.parent.name: measured(turbo) for turbo in runs if (turbo / "portability.json").is_file()}
    print("| wanted | at least |" + "".join(f" {name} |" for name in found))
    print("|---|---|" + "---|" * len(found))
    for title in (*WANTED, "minutes of distillation"):
        cells = (row[title] for row in found.values())
        shown = "".join(f" {'not measured' if cell is None else f'{cell:.2f}'} |" for cell in cells)
        print(f"| {title} | {WANTED.get(title, 'at most 30')} |{shown}")


if __name__ == "__main__":
    main()
