"""How well rubric totals agree with people: recorded yes/no answers of two VQA models to DSG's questions.

    python benchmarks/aggregation.py --data FOLDER [--json FILE]

FOLDER holds `dsg/` with `mplug_dsg.csv`, `pali17b_dsg.csv` and `tifa160-likert-anns.csv` of the DSG release (Cho et
al., ICLR 2024, arXiv 2310.18235; github.com/j-min/DSG): 160 prompts, five models, about five Likert ratings an image.
Each way of adding up is compared with the mean rating: Spearman's and Kendall's correlation over all images, the share
of pairs of images of one prompt that it orders as people do (of pairs that people tell apart; a tie counts half), and
the share of pairs that it ties, which teach a group-relative method nothing.
"""

import argparse
import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr

from rlhf_img.rubrics.schema import Aggregate
from rlhf_img.rubrics.scoring import RequirementResult, aggregate, apply_needs

Image = tuple[str, str]
"""Prompt id and name of the model that drew it."""


def ratings(file: Path) -> dict[Image, float]:
    """The mean human rating of each image, 1 to 5."""
    found: defaultdict[Image, list[float]] = defaultdict(list)
    for row in csv.DictReader(file.open(encoding="utf-8")):
        found[row["item_id"], row["t2i_model"]].append(float(row["answer"]))
    return {image: float(np.mean(values)) for image, values in found.items()}


def answers(file: Path) -> dict[Image, dict[str, tuple[tuple[str, ...], float]]]:
    """Of each image and question id: the ids it depends on (unknown ones and itself left out), and yes as 1.

    Prompts whose questions depend on each other in a circle are left out.
    """
    found: defaultdict[Image, dict[str, tuple[tuple[str, ...], float]]] = defaultdict(dict)
    for row in csv.DictReader(file.open(encoding="utf-8")):
        needs = tuple(n for n in row["dependency_id"].replace(" ", "").split(",") if n != row["question_id"])
        found[row["item_id"], row["t2i_model"]][row["question_id"]] = needs, float(row["answer"] == "yes")
    known = {
        image: {i: (tuple(n for n in needs if n in asked), score) for i, (needs, score) in asked.items()}
        for image, asked in found.items()
    }
    return {image: asked for image, asked in known.items() if not _is_cyclic(asked)}


def _is_cyclic(asked: Mapping[str, tuple[tuple[str, ...], float]]) -> bool:
    try:
        TopologicalSorter({i: needs for i, (needs, _) in asked.items()}).prepare()
    except CycleError:
        return True
    return False


def total(asked: Mapping[str, tuple[tuple[str, ...], float]], method: str, *, needs: bool) -> float:
    """One image's total, by the code that training uses."""
    scores: Mapping[str, float | None] = {i: score for i, (_, score) in asked.items()}
    if needs:
        scores = apply_needs({i: of for i, (of, _) in asked.items()}, scores)
    results = [
        RequirementResult(id=i, check="vqa", text="", score=s, passed=None, weight=1.0, evidence="")
        for i, s in scores.items()
    ]
    value = aggregate(results, Aggregate(method=method))  # type: ignore[arg-type]
    assert value is not None
    return value


def agreement(totals: Mapping[Image, float], human: Mapping[Image, float]) -> dict[str, float]:
    """Correlations, order and ties; see the module."""
    images = [image for image in human if image in totals]
    ours, theirs = [totals[i] for i in images], [human[i] for i in images]
    by_prompt: defaultdict[str, list[Image]] = defaultdict(list)
    for image in images:
        by_prompt[image[0]].append(image)
    pairs = [pair for group in by_prompt.values() for pair in combinations(group, 2)]
    told_apart = [(a, b) for a, b in pairs if human[a] != human[b]]
    right = [0.5 * (1 + np.sign(totals[a] - totals[b]) * np.sign(human[a] - human[b])) for a, b in told_apart]
    return {
        "images": len(images),
        "spearman": float(spearmanr(ours, theirs).statistic),
        "kendall": float(kendalltau(ours, theirs).statistic),
        "order": float(np.mean(right)),
        "ties": float(np.mean([totals[a] == totals[b] for a, b in pairs])),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.data / "dsg"
    human = ratings(folder / "tifa160-likert-anns.csv")
    table = Table(title="Rubric totals against human ratings")
    columns = ("images", "spearman", "kendall", "order", "ties")
    for column in ("judge", "method", "needs", *columns):
        table.add_column(column, justify="left" if column in ("judge", "method") else "right")
    rows = []
    for judge in ("mplug", "pali17b"):
        asked = answers(folder / f"{judge}_dsg.csv")
        for method in ("weighted_mean", "geometric", "all"):
            for needs in (False, True):
                totals = {image: total(of, method, needs=needs) for image, of in asked.items()}
                found = agreement(totals, human)
                rows.append({"judge": judge, "method": method, "needs": needs, **found})
                cells = [f"{found[c]:.0f}" if c == "images" else f"{found[c]:.3f}" for c in columns]
                table.add_row(judge, method, "yes" if needs else "no", *cells)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
