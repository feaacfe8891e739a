"""Tables of the experiment, as Markdown, from the cards of the detectors; the shipped one is measured here first.

    python table.py runs/artifact-detection [--seeds 0 1 2] [--pairs 1026]

Of photographs, a seed is another training and another held-out part of the pictures; of the playground, other held-out
scenes and damage, judged by the one shipped network. Writes `results.json` into the folder.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_img.rewards.appearance import in_every_style
from rlhf_img.rewards.artifact_measure import HELDOUT_SEED, evaluate
from rlhf_img.rewards.artifact_model import load_detector
from rlhf_img.rewards.artifact_pairs import Playground

GOAL = 0.03
"""Style false positives at 95 % recall that are wanted at most."""


class EveryStyle(Playground):
    """The playground, with its clean renders in every style at three strengths, as photographs are measured."""

    def styled(self, n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Clean renders as they are, and in each style."""
        plain = dict(super().styled(n, seed))["no style"]
        return in_every_style(plain, seed)


def shipped(out: Path, seed: int, pairs: int) -> dict[str, Any]:
    """The figures of the shipped detector on a seed's scenes; kept in a file."""
    file = out / f"playground-{seed}-{pairs}.json"
    if not file.is_file():
        found = evaluate(load_detector().net, source=EveryStyle(), n=pairs, seed=HELDOUT_SEED + 100 * (seed + 1))
        file.write_text(json.dumps(found, indent=1))
    return dict(json.loads(file.read_text()))


def rows_of(cards: list[dict[str, Any]]) -> list[tuple[str, list[float]]]:
    """Measures and their value for each seed."""
    keys = list(cards[0]["auc_per_class"])
    styles = [name for name in cards[0]["false_positives_at_95_recall"] if name not in ("random looks", "no style")]
    return [
        ("AUC", [c["auc"] for c in cards]),
        *((f"AUC, {key}", [c["auc_per_class"].get(key, np.nan) for c in cards]) for key in keys),
        ("recall at 5 % false positives", [c["recall_at_5_false_positives"] for c in cards]),
        ("heat map hits, hottest cell", [c["heat_hits"]["hottest cell"] for c in cards]),
        ("heat map hits, a blind guess", [c["heat_hits"]["any cell"] for c in cards]),
        ("calibration error", [c["calibration_error"] for c in cards]),
        *((f"false positives at 95 % recall, {name}", [c["false_positives_at_95_recall"][name] for c in cards])
          for name in ("no style", *styles)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=1026)
    options = parser.parse_args()
    results = {}
    for title, cards in (
        ("Photographs", [json.loads((options.out / f"photos-{s}" / "artifact.json").read_text())["heldout"]
                         for s in options.seeds]),
        ("Playground, shipped weights", [shipped(options.out, s, options.pairs) for s in options.seeds]),
    ):  # fmt: skip
        rows = rows_of(cards)
        results[title] = {name: values for name, values in rows}
        print(f"\n| {title} | mean | {' | '.join(f'seed {s}' for s in options.seeds)} |")
        print("|---" * (len(options.seeds) + 2) + "|")
        for name, values in rows:
            missed = " (goal missed)" if name.startswith("false") and max(values) > GOAL else ""
            print(f"| {name}{missed} | {np.nanmean(values):.3f} | {' | '.join(f'{v:.3f}' for v in values)} |")
    (options.out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
