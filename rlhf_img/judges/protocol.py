"""What a judge is: questions about images in, P(yes) or the reason for its absence out, and an account of its calls."""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from rlhf_img.errors import RunStopped

QUESTION = "{question} Answer with one word, Yes or No."
"""How a question is put. It comes after the image, so that a server can keep the image's part of the prompt."""

YES, NO = "yes", "no"
MIN_MASS = 0.1
"""Least probability of yes and no together; below it the model was about to say something else."""

Message = Mapping[str, str]
"""One turn of a conversation, with `role` ("system", "user" or "assistant") and `content`."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which judge, how it is asked, and how much failure it is allowed."""

    model: str
    """What the server calls the model; without `url`, the folder or name that transformers loads it from, or
    "playground" for the package's own judge of the playground's images."""
    url: str | None = None
    """An OpenAI-compatible server, such as http://localhost:8000/v1. null: the model runs in this process."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key."""
    votes: int = 0
    """0: P(yes) from token probabilities. Else the share of yes in so many samples, for servers without them."""
    concurrency: int = 32
    """Requests in flight at a time; without `url`, questions in one batch."""
    connect_s: float = 5.0
    """Seconds to reach the server."""
    timeout_s: float = 120.0
    """Seconds for a whole reply, however slowly it comes."""
    attempts: int = 4
    """Tries of one request; 429, 5xx, time-outs and lost connections are tried again."""
    max_wait_s: float = 60.0
    """The most seconds to wait before a retry because the server asks for it (`Retry-After`)."""
    max_tokens: int = 2048
    """Length of a reply to a text conversation."""
    max_failed: float = 0.5
    """The run stops if a greater share than this of the last calls (20 to 200) gave no answer."""
    canary_every: int = 1000
    """After so many questions a few of the first are asked again, to see whether the judge has changed. 0: never."""

    def __post_init__(self) -> None:
        for name, least in (("votes", 0), ("concurrency", 1), ("attempts", 1), ("max_tokens", 1), ("canary_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}; given {getattr(self, name)}")
        if not 0 <= self.max_failed <= 1:
            raise ValueError(f"max_failed is a share in [0, 1]; given {self.max_failed}")
        if self.connect_s <= 0 or self.timeout_s <= 0:
            raise ValueError(f"connect_s and timeout_s are above 0; given {self.connect_s} and {self.timeout_s}")
        if self.max_wait_s < 0:
            raise ValueError(f"max_wait_s is at least 0; given {self.max_wait_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A yes/no question about an image, uint8 (H, W, 3), RGB."""

    image: npt.NDArray[np.uint8]
    question: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`p_yes` in [0, 1], or None with the `reason`. `seconds` from the first try to the end of the last."""

    p_yes: float | None
    reason: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a judge said in a conversation, or None with the `reason`."""

    text: str | None
    reason: str | None = None


@runtime_checkable
class Judge(Protocol):
    """Answers in batches; the judge decides what of a batch is in flight together."""

    @property
    def id(self) -> str:
        """Pins model, question template and decoding. Scores with different ids must not be compared."""

    @property
    def usage(self) -> "Usage":
        """What it has done so far."""

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer for each question. Asks about one image are best next to each other.

        Raises RunStopped if more than the allowed share of the last calls failed.
        """

    def chat(self, conversations: Sequence[Sequence[Message]], schema: Mapping[str, Any]) -> list[Reply]:
        """One reply for each conversation: JSON text of the JSON schema, as far as the judge can enforce it.

        Raises RunStopped as `ask` does.
        """


class Drift(NamedTuple):
    """How far a judge's answers to its canary questions are from its first ones."""

    change: float
    """Mean absolute change of P(yes)."""
    flipped: float
    """Share of the questions whose answer went from yes to no or back."""


@dataclass(kw_only=True)
class Usage:
    """An account of a judge's calls, and the stop when too many of them fail.

    calls: questions and conversations, of which `failures` gave nothing, for the `reasons` counted. retries, seconds
    (summed over calls, and `latest` for each of the last calls) and tokens as the server states them. drift: one entry
    for each time that the canary questions were asked again.
    """

    max_failed: float = 0.5
    calls: int = 0
    failures: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    drift: list[Drift] = field(default_factory=list)
    _recent: deque[str | None] = field(default_factory=lambda: deque(maxlen=200))

    def record(self, reason: str | None, seconds: float = 0.0) -> None:
        """Count one call; `reason` says why it failed. Raises RunStopped if too many of the last ones did."""
        self.calls += 1
        self.seconds += seconds
        self.latest.append(seconds)
        self._recent.append(reason)
        if reason is None:
            return
        self.failures += 1
        self.reasons[reason] += 1
        failed = Counter(r for r in self._recent if r is not None)
        if len(self._recent) >= 20 and failed.total() > self.max_failed * len(self._recent):
            listed = "; ".join(f"{count} x {text}" for text, count in failed.most_common(3))
            raise RunStopped(
                f"the judge failed in {failed.total()} of its last {len(self._recent)} calls, more than the "
                f"{self.max_failed:.0%} that max_failed allows: {listed}. See that the server is up and the model's "
                "name is right (rlhf-img doctor --judge-url URL --judge-model NAME), then go on with --resume"
            )


def verdict_of(text: str) -> str | None:
    """YES or NO if that is what a token or a short reply says, whatever its case, white space and punctuation."""
    word = text.strip(" \t\n\r\"'`*.,!:;()<>▁ĠĊ").lower()
    return word if word in (YES, NO) else None


def p_yes_from_logprobs(tokens: Iterable[tuple[str, float]]) -> Answer:
    """P(yes) of the first token: the mass of all ways to write yes over that of yes and no (Lin et al. 2024).

    tokens: the likeliest first tokens with their log-probabilities. Unscored where yes and no have nearly no mass.

    >>> round(p_yes_from_logprobs([("Yes", math.log(0.5)), (" yes", math.log(0.1)), ("No", math.log(0.2))]).p_yes, 6)
    0.75
    """
    mass = {YES: 0.0, NO: 0.0}
    for token, logprob in tokens:
        if (verdict := verdict_of(token)) is not None:
            mass[verdict] += math.exp(logprob)
    if (total := mass[YES] + mass[NO]) < MIN_MASS:
        return Answer(p_yes=None, reason="neither yes nor no is likely as the first word of the reply")
    return Answer(p_yes=mass[YES] / total)


def template_hash() -> str:
    """Short hash of how questions are put."""
    return hashlib.sha256(QUESTION.encode()).hexdigest()[:8]
