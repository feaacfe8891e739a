"""A judge without a model, for tests and for trying a set-up out: deterministic, and as slow or faulty as one asks."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_img.judges.protocol import Answer, Ask, Message, Reply, Usage


class FakeJudge:
    """Answers by `answer`, or else by a hash of image and question; the same question gets the same answer.

    answer: P(yes) of a question about an image. reply: what is said in a conversation. failing: share of calls, chosen
    by the hash, that get no answer. seconds: how long each call takes.
    """

    def __init__(
        self,
        *,
        answer: Callable[[Ask], float | None] | None = None,
        reply: Callable[[Sequence[Message]], str | None] | None = None,
        failing: float = 0.0,
        seconds: float = 0.0,
        max_failed: float = 0.5,
    ) -> None:
        self._answer, self._reply, self._failing, self._seconds = answer, reply, failing, seconds
        self.usage = Usage(max_failed=max_failed)

    @property
    def id(self) -> str:
        return "fake"

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        return [self._asked(ask) for ask in asks]

    def chat(self, conversations: Sequence[Sequence[Message]], schema: Mapping[str, Any]) -> list[Reply]:
        texts = [self._reply(turns) if self._reply else None for turns in conversations]
        reasons = [None if text is not None else "the fake judge says nothing" for text in texts]
        for reason in reasons:
            self._count(reason)
        return [Reply(text=text, reason=reason) for text, reason in zip(texts, reasons, strict=True)]

    def _asked(self, ask: Ask) -> Answer:
        digest = hashlib.sha256(ask.image.tobytes() + ask.question.encode()).digest()
        p_yes = self._answer(ask) if self._answer else digest[0] / 255
        if digest[1] < 256 * self._failing:
            p_yes = None
        reason = None if p_yes is not None else "the fake judge was told to fail"
        self._count(reason)
        return Answer(p_yes=p_yes, reason=reason, seconds=self._seconds)

    def _count(self, reason: str | None) -> None:
        time.sleep(self._seconds)
        self.usage.record(reason, self._seconds)
