"""What the answers say: pairs that people prefer, how far people agree with each other, and with the data's order."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf_img.training.annotation.candidates import Candidate
from rlhf_img.training.annotation.store import Label
from rlhf_img.training.intervals import interval
from rlhf_img.training.pairs import Pair


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far the answers can be trusted. Skipped pairs count nowhere but in `skipped`."""

    answers: int
    annotators: dict[str, int]
    """Answers by person."""
    skipped: int
    ties: float | None
    """Share of the answers."""
    left: float | None
    """Share of the decided answers that prefer what was on the left; far from a half, people do not look."""
    judged_twice: int
    """Pairs that two people or more have judged."""
    agree: float | None
    """Share of two people's answers to one pair that are the same."""
    alpha: float | None
    """Krippendorff's alpha of these answers: 1 agreement, 0 chance."""
    preferred: dict[str, dict[str, float | int | None]]
    """ "after > before" -> share of the decided answers, with its 95 % interval over pairs."""

    def lines(self) -> list[str]:
        """For people."""
        def share(value: float | None) -> str:
            return "not known" if value is None else f"{value:.0%}"

        people = ", ".join(f"{name} {count}" for name, count in self.annotators.items())
        lines = [f"{self.answers} answers ({people or 'nobody'}), {share(self.ties)} ties, {self.skipped} skipped",
                 f"prefer what is on the left: {share(self.left)}"]
        alpha = "not known" if self.alpha is None else f"{self.alpha:.2f}"
        lines.append(f"{self.judged_twice} pairs by two people or more: {share(self.agree)} the same, alpha {alpha}")
        lines += [f"{name}: {share(found['mean'])} of {found['n']} pairs "
                  f"({share(found['low'])} to {share(found['high'])})" for name, found in self.preferred.items()]
        return lines


def agreement(candidates: Iterable[Candidate], labels: Iterable[Label]) -> Agreement:
    """Of the answers to these pairs."""
    known = {candidate.id: candidate for candidate in candidates}
    labels = [label for label in labels if label.pair in known]
    kept = [label for label in labels if label.choice != "skip"]
    decided = [label for label in kept if label.choice != "tie"]
    by_pair = _by_pair(kept)
    several = [answers for answers in by_pair.values() if len(answers) > 1]
    same = [one == other for answers in several for one, other in combinations(answers, 2)]
    wins = defaultdict(list)
    for pair, answers in by_pair.items():
        if votes := [int(choice == "1") for choice in answers if choice != "tie"]:
            first, second = known[pair].names
            # The order of a data set is its claim; of a run, the later checkpoint is.
            claim = f"{first} > {second}" if first == "chosen" else f"{second} > {first}"
            share = float(np.mean(votes))
            wins[claim].append(1 - share if first == "chosen" else share)
    return Agreement(
        answers=len(kept), annotators=dict(Counter(label.annotator for label in kept).most_common()),
        skipped=len(labels) - len(kept), ties=1 - len(decided) / len(kept) if kept else None,
        left=float(np.mean([label.choice == str(label.left_image) for label in decided])) if decided else None,
        judged_twice=len(several), agree=float(np.mean(same)) if same else None, alpha=krippendorff(several),
        preferred={claim: interval(shares) for claim, shares in sorted(wins.items())},
    )  # fmt: skip


def krippendorff(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 - observed / expected disagreement. None where all values are one.

    units: the values that each thing got, two or more of each.
    """
    pairable = Counter(value for values in units for value in values)
    total = sum(pairable.values())
    expected = sum(a * b for (_, a), (_, b) in combinations(pairable.items(), 2)) * 2
    if not expected:
        return None
    observed = sum(
        sum(one != other for one, other in combinations(values, 2)) * 2 / (len(values) - 1) for values in units
    )
    return 1 - (total - 1) * observed / expected


def preferences(candidates: Iterable[Candidate], labels: Iterable[Label]) -> tuple[list[Pair], int]:
    """Pairs in which more people prefer one image, with the majority's lead as margin; and how many are undecided.

    The margin is in (0, 1]: (votes for less votes against) / all votes, ties among them.
    """
    votes = _by_pair(label for label in labels if label.choice != "skip")
    pairs, undecided = [], 0
    for candidate in candidates:
        if not (answers := votes.get(candidate.id)):
            continue
        lead = answers.count("1") - answers.count("0")
        if lead == 0:
            undecided += 1
            continue
        better = int(lead > 0)
        pairs.append(Pair(
            prompt=candidate.prompt, chosen=candidate.images[better], rejected=candidate.images[1 - better],
            source=f"people: {candidate.names[better]} > {candidate.names[1 - better]}",
            on_policy=candidate.on_policy, margin=abs(lead) / len(answers),
        ))  # fmt: skip
    return pairs, undecided


def _by_pair(labels: Iterable[Label]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for label in labels:
        found[label.pair].append(str(label.choice))
    return found
