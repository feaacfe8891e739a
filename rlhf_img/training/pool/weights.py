"""How likely each prompt is to be drawn, from what its groups have shown so far. Pure functions of arrays.

A group teaches by the differences within it. For a reward that passes or fails, with a rate p, the variance within a
group is p (1 - p) on average: nothing for a prompt that is solved or hopeless, most for one between ("learnability",
Foster et al. 2025, arXiv 2502.12272). For a soft reward it is the square of the spread. So the variance is the signal
of both. A prompt whose groups have shown no spread some times in a row is rested, where DAPO (Yu et al. 2025,
arXiv 2503.14476) samples on and throws such groups away, and comes back after a while, since the policy changes.

Axis: N prompts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf_img.errors import RlhfImgError

MEMORY = 8
"""Groups that an average remembers: the first ones count alike, then older ones fade, because the policy moves."""
PRIOR = 4.0
"""Groups that count for what is known of a prompt's cluster, beside its own; and of all prompts, beside a cluster's."""
_BALANCE = 0.5
"""A cluster's share grows with its number of prompts to this power: 1 would leave rare things rare, 0 would draw a
single odd prompt as often as a thousand alike. The root is usual for languages of unlike size (arXiv 1901.07291)."""
_MAX_DOUBLINGS = 6
_WINDOW = 1 / 16
"""Share of all draws that are about as long: an iteration's."""
_CHOICE = 4
"""Equally likely prompts for each that is drawn, which an iteration has to choose from at least."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Which prompts an iteration draws."""

    curriculum: bool = False
    """Draw prompts by the signal expected of them; false: each as often as any other. What the groups show is recorded
    in any case."""
    explore: float = 0.2
    """Share of draws that follow no signal: every prompt keeps its part of them, whatever is known of it."""
    patience: int = 3
    """Groups without spread in a row after which a prompt rests."""
    rest: int = 50
    """Iterations of the first rest; each further group without spread doubles it, up to 64 times."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        if not 0 < self.explore <= 1:
            raise RlhfImgError(f"pool.explore is a share above 0 and at most 1; got {self.explore}")
        for name in ("patience", "rest"):
            if getattr(self, name) < 1:
                raise RlhfImgError(f"pool.{name} must be 1 or more; got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Group:
    """What one group has shown.

    score: mean over its images of the objectives on their ranges, in [0, 1]; None where a range is infinite.
    variance: within the group, in the same units. flat: whether no objective's spread is above its noise.
    """

    score: float | None
    variance: float
    flat: bool


@dataclass(slots=True)
class Statistics:
    """What is known of N prompts."""

    groups_N: Ints
    """Groups so far."""
    score_N: Floats
    """Their mean score; NaN where none is known."""
    variance_N: Floats
    """Their mean variance; 0 without a group."""
    flat_N: Ints
    """Groups without spread since the last one with some."""
    last_N: Ints
    """The iteration, by the pool's clock, of the last group."""

    @classmethod
    def unknown(cls, count: int) -> "Statistics":
        """Of prompts that were never drawn."""
        none = np.zeros(count, np.int64)
        return cls(none, np.full(count, np.nan), np.zeros(count), none.copy(), none.copy())

    def record(self, row: int, group: Group, clock: int) -> None:
        """Adds a group of prompt `row`, drawn at `clock`."""
        self.groups_N[row] += 1
        rate = 1 / min(int(self.groups_N[row]), MEMORY)
        self.variance_N[row] += rate * (group.variance - self.variance_N[row])
        if group.score is not None:
            before = group.score if np.isnan(self.score_N[row]) else self.score_N[row]
            self.score_N[row] = before + rate * (group.score - before)
        self.flat_N[row] = self.flat_N[row] + 1 if group.flat else 0
        self.last_N[row] = clock


def resting(stats: Statistics, clock: int, config: PoolConfig) -> npt.NDArray[np.bool_]:
    """Which prompts are retired for now: `patience` or more groups without spread in a row, the last one not
    rest * 2^(groups beyond) iterations ago."""
    beyond_N = stats.flat_N - config.patience
    found_N = beyond_N >= 0
    rows = np.flatnonzero(found_N)
    found_N[rows] = clock - stats.last_N[rows] < config.rest * 2 ** np.minimum(beyond_N[rows], _MAX_DOUBLINGS)
    return found_N


def expected_signal(stats: Statistics, cluster_N: Ints) -> Floats:
    """The variance to expect of a prompt's next group, (N,).

    Its own mean, drawn towards its cluster's by `PRIOR` groups, and that towards the mean of all in the same way
    (empirical Bayes): so a prompt that was never drawn is expected to be as its neighbours are, and one group of chance
    does not decide. 1 for all where nothing is known.
    """
    seen = np.flatnonzero(stats.groups_N)
    if not len(seen):
        return np.ones(len(stats.groups_N))
    groups_S, cluster_S = np.minimum(stats.groups_N[seen], MEMORY), cluster_N[seen]
    sums_S = groups_S * stats.variance_N[seen]
    count = int(cluster_N.max()) + 1
    sums_C, groups_C = np.bincount(cluster_S, sums_S, count), np.bincount(cluster_S, groups_S, count)
    cluster_C = (sums_C + PRIOR * sums_S.sum() / groups_S.sum()) / (groups_C + PRIOR)
    expected: Floats = cluster_C[cluster_N]
    expected[seen] = (sums_S + PRIOR * expected[seen]) / (groups_S + PRIOR)
    return expected


def sampling_weights(stats: Statistics, cluster_N: Ints, clock: int, config: PoolConfig, *, least: int = 1) -> Floats:
    """The probability with which each prompt is drawn first, (N,), sum 1.

        w_i = (1 - explore) u_i e_i / sum_j u_j e_j + explore u_i / sum_j u_j,    u_i = n_c^(1/2 - 1)

    e: `expected_signal`; n_c: prompts awake in the cluster of i; u, sum and all are over prompts that do not rest, and
    a resting one has 0. If fewer than `least` are awake, all are.

    cluster_N: the cluster of each prompt, from 0. clock: this iteration, by the pool's clock.
    """
    awake_N = ~resting(stats, clock, config)
    if awake_N.sum() < least:
        awake_N[:] = True
    sizes_C = np.maximum(np.bincount(cluster_N, awake_N), 1.0)
    even_N: Floats = (sizes_C ** (_BALANCE - 1))[cluster_N] * awake_N
    even_N /= even_N.sum()
    signal_N = even_N * expected_signal(stats, cluster_N)
    if not (total := signal_N.sum()):
        return even_N
    signal_N *= (1 - config.explore) / total
    signal_N += config.explore * even_N
    return signal_N


def about_one_length(weights_N: Floats, lengths_N: Ints, count: int, at: float) -> Floats:
    """The weights of prompts that are about as long and so share a forward, for an iteration that draws `count`; 0 for
    the others, sum 1.

    Laid end to end by length, the weights are a ring of length 1, of which this is the window from `at` on, in [0, 1).
    Over all windows a prompt has the weight that it had. The fewer prompts there are, the wider is the window: with
    less than some for each that is drawn, there would be no choice, and the weights no effect.
    """
    width = min(1.0, max(_WINDOW, _CHOICE * count / effective_number(weights_N)))
    order = np.argsort(lengths_N, kind="stable")
    ends = np.cumsum(weights_N[order])
    starts = ends - weights_N[order]
    inside = [np.minimum(ends, left + width) - np.maximum(starts, left) for left in (at, at - 1)]
    found = np.zeros_like(weights_N)
    found[order] = np.clip(inside, 0, None).sum(0)
    return found / found.sum()


def draw_weighted(weights_N: Floats, count: int, rng: np.random.Generator) -> list[int]:
    """`count` prompts, one after the other by their weights, without putting back. Weights sum to 1.

    Those of weight 0 are never drawn. If there are fewer than `count`, all come once, then again in another order.
    """
    most = int(np.count_nonzero(weights_N))
    drawn: list[int] = []
    while len(drawn) < count:
        some = min(count - len(drawn), most)
        drawn += rng.choice(len(weights_N), some, replace=False, p=weights_N).tolist()
    return drawn


def effective_number(weights_N: Floats) -> float:
    """How many equally likely prompts would be as varied: 1 / sum of squares (Kish), for weights that sum to 1."""
    return float(1 / np.square(weights_N).sum())
