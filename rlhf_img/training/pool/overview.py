"""What a pool holds and knows, for people."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_img.training.pool.clusters import typical_words
from rlhf_img.training.pool.store import Entry, PoolFile
from rlhf_img.training.pool.weights import PoolConfig, Statistics, effective_number, resting, sampling_weights

_LEVELS = (("lowest", 0.0), ("quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75), ("highest", 1.0))
_SHOWN = 5


def overview(pool: PoolFile, config: PoolConfig) -> dict[str, Any]:
    """How many prompts there are, where they are from and why some are retired; of those that are not, what is known,
    how many rest, how many equally likely ones a run would draw from, and which have the widest spread and the lowest
    score."""
    everything = pool.entries(retired=True)
    active = [entry for entry in everything if entry.retired is None]
    stats, clock = pool.statistics([entry.id for entry in active]), pool.clock
    seen = np.flatnonzero(stats.groups_N)
    scored = np.flatnonzero(~np.isnan(stats.score_N))
    weights_N = sampling_weights(stats, _clusters(active), clock, config) if active else np.zeros(0)
    spread_N = np.sqrt(stats.variance_N)
    return {
        "prompts": len(everything), "active": len(active),
        "retired": dict(Counter(entry.retired for entry in everything if entry.retired is not None).most_common()),
        "sources": dict(Counter(entry.source for entry in everything).most_common()),
        "clusters": len({entry.cluster for entry in active}), "iterations": clock,
        "groups": int(stats.groups_N.sum()), "seen": len(seen), "resting": int(resting(stats, clock, config).sum()),
        "effective": effective_number(weights_N) if active else 0.0,
        "difficulty": _quantiles(1 - stats.score_N[scored]), "spread": _quantiles(spread_N[seen]),
        "widest_spread": [active[i].text for i in seen[np.argsort(-spread_N[seen], kind="stable")][:_SHOWN]],
        "hardest": [active[i].text for i in scored[np.argsort(stats.score_N[scored], kind="stable")][:_SHOWN]],
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster: its prompts, its share of them and of the draws to come, and what is known of it (None: nothing)."""

    cluster: int
    prompts: int
    share: float
    drawn: float
    groups: int
    difficulty: float | None
    spread: float | None
    words: list[str]


def coverage(pool: PoolFile, config: PoolConfig) -> list[ClusterView]:
    """The clusters of the prompts that are not retired, the largest first."""
    active = pool.entries()
    if not active:
        return []
    stats, labels_N = pool.statistics([entry.id for entry in active]), _clusters(active)
    weights_N = sampling_weights(stats, labels_N, pool.clock, config)
    texts = [entry.text for entry in active]
    views = []
    for label in np.unique(labels_N).tolist():
        rows = np.flatnonzero(labels_N == label)
        views.append(ClusterView(
            label, len(rows), len(rows) / len(active), float(weights_N[rows].sum()), int(stats.groups_N[rows].sum()),
            *_known(stats, rows), typical_words([texts[i] for i in rows], texts),
        ))  # fmt: skip
    return sorted(views, key=lambda view: -view.prompts)


def matching(
    pool: PoolFile, entries: Sequence[Entry], *, solved: float | None, hopeless: float | None, least_groups: int
) -> dict[int, str]:
    """Those of the entries whose mean score is at least `solved` or at most `hopeless`, after at least so many groups:
    id -> which of the two."""
    stats, found = pool.statistics([entry.id for entry in entries]), {}
    for entry, score, groups in zip(entries, stats.score_N.tolist(), stats.groups_N.tolist(), strict=True):
        if groups < least_groups:  # NaN is neither of the two
            continue
        if solved is not None and score >= solved:
            found[entry.id] = "solved"
        elif hopeless is not None and score <= hopeless:
            found[entry.id] = "hopeless"
    return found


def _clusters(entries: Sequence[Entry]) -> np.ndarray:
    return np.array([entry.cluster for entry in entries], np.int64)


def _known(stats: Statistics, rows: np.ndarray) -> tuple[float | None, float | None]:
    """Mean difficulty and spread of some prompts."""
    scores = stats.score_N[rows]
    scores, seen = scores[~np.isnan(scores)], rows[stats.groups_N[rows] > 0]
    return (
        1 - float(scores.mean()) if len(scores) else None,
        math.sqrt(stats.variance_N[seen].mean()) if len(seen) else None,
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.quantile(values, level)) for name, level in _LEVELS} if len(values) else {}
