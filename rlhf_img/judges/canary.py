"""The canary: a few questions asked again and again, because a judge that changes moves every score."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_img.judges.protocol import Answer, Ask, Drift, Judge, Message, Reply, Usage

log = logging.getLogger(__name__)

SIZE = 16
"""How many questions are kept, from all over the first batches: neighbours are often about one image."""
TOLERANCE = 0.1
"""Mean absolute change of P(yes) from which on it is logged as a warning."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A canary's questions with their first answers, and how many others were asked since they last were."""

    kept: tuple[tuple[Ask, float], ...]
    since: int


class Canary:
    """A judge that keeps its first answers and asks the same questions again after every `every` questions.

    What has changed since the first time goes to `usage.drift`.
    """

    def __init__(self, judge: Judge, *, every: int) -> None:
        self._judge, self._every = judge, every
        self._kept: list[tuple[Ask, float]] = []
        self._since = 0

    @property
    def baseline(self) -> Baseline:
        """What is to be kept where a run may be resumed."""
        return Baseline(kept=tuple(self._kept), since=self._since)

    def restore(self, baseline: Baseline) -> None:
        """Goes on from a baseline that was kept."""
        self._kept, self._since = list(baseline.kept), baseline.since

    @property
    def id(self) -> str:
        return self._judge.id

    @property
    def usage(self) -> Usage:
        return self._judge.usage

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        answers = self._judge.ask(asks)
        self._keep([(a, b.p_yes) for a, b in zip(asks, answers, strict=True) if b.p_yes is not None])
        self._since += len(asks)
        if self._since >= self._every:
            self._since = 0
            self._ask_again()
        return answers

    def chat(self, conversations: Sequence[Sequence[Message]], schema: Mapping[str, Any]) -> list[Reply]:
        return self._judge.chat(conversations, schema)

    def _keep(self, scored: Sequence[tuple[Ask, float]]) -> None:
        if room := SIZE - len(self._kept):
            chosen = scored[:: max(1, len(scored) // room)][:room]
            # A copy: an image may be a view of a whole batch, which would stay in memory with it.
            self._kept += [(replace(ask, image=ask.image.copy()), p_yes) for ask, p_yes in chosen]

    def _ask_again(self) -> None:
        now = self._judge.ask([ask for ask, _ in self._kept])
        pairs = [(before, a.p_yes) for a, (_, before) in zip(now, self._kept, strict=True) if a.p_yes is not None]
        if not pairs:
            return
        drift = Drift(
            change=sum(abs(after - before) for before, after in pairs) / len(pairs),
            flipped=sum((before >= 0.5) != (after >= 0.5) for before, after in pairs) / len(pairs),
        )
        self.usage.drift.append(drift)
        if drift.change > TOLERANCE:
            log.warning(
                "judge %s: P(yes) of %d canary questions has changed by %.2f on average since the start, and %.0f%% of "
                "the answers with it; scores from then and now are not comparable",
                self.id, len(pairs), drift.change, 100 * drift.flipped,
            )  # fmt: skip
