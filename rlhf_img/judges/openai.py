"""A judge behind an OpenAI-compatible server, such as vLLM or `transformers serve`."""

import asyncio
import base64
import io
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.protocol import (
    NO,
    QUESTION,
    YES,
    Answer,
    Ask,
    JudgeConfig,
    Message,
    Reply,
    Usage,
    p_yes_from_logprobs,
    template_hash,
    verdict_of,
)

TOP_LOGPROBS = 20
"""The most that OpenAI's interface and vLLM give without further settings."""

_backoff = wait_random_exponential(multiplier=0.5, max=20)

T = TypeVar("T")


class _Token(BaseModel):
    token: str
    logprob: Annotated[float, Field(le=1e-3)]  # refuses NaN too; some servers round a little above 0


class _Position(BaseModel):
    top_logprobs: list[_Token]


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Said(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Said
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    """The part of a chat completion that is read; everything else in it is ignored."""

    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    usage: _Tokens | None = None


class _NoAnswerError(Exception):
    """There is no reply, or one that cannot be used; the message is the reason."""


class OpenAIJudge:
    """Asks a server, with up to `concurrency` questions in flight, each retried after growing, random waits, and
    after what the server asks for.

    P(yes) comes from the first token's probabilities or, with `votes`, from repeated samples, each a request of its
    own because not every server gives several at once.
    """

    def __init__(self, config: JudgeConfig) -> None:
        """Raises RlhfImgError if the URL is none or the environment lacks the key."""
        self._endpoint = _endpoint(config.url)
        self._key = _key(config.api_key_env)
        self.config = config
        self.usage = Usage(max_failed=config.max_failed)

    @property
    def id(self) -> str:
        decoding = f"votes{self.config.votes}-t1" if self.config.votes else f"logprobs{TOP_LOGPROBS}-t0"
        return f"{self.config.model}@{template_hash()}/{decoding}"

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        images = {id(ask.image): ask.image for ask in asks}
        # Only images in flight are kept as text: all of a large batch would be gigabytes.
        encoded = lru_cache(maxsize=self.config.concurrency)(lambda key: _data_uri(images[key]))

        async def work(client: httpx.AsyncClient, ask: Ask) -> float:
            text = QUESTION.format(question=ask.question)
            image = {"type": "image_url", "image_url": {"url": encoded(id(ask.image))}}
            messages = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
            return await (self._vote(client, messages) if self.config.votes else self._read(client, messages))

        answers = self._batch(asks, work)
        return [Answer(p_yes=p_yes, reason=reason, seconds=seconds) for p_yes, reason, seconds in answers]

    def chat(self, conversations: Sequence[Sequence[Message]], schema: Mapping[str, Any]) -> list[Reply]:
        form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": dict(schema), "strict": True}}

        async def work(client: httpx.AsyncClient, turns: Sequence[Message]) -> str:
            settings = {"temperature": 0, "max_tokens": self.config.max_tokens, "response_format": form}
            choice = await self._complete(client, [dict(turn) for turn in turns], settings)
            if choice.finish_reason == "length":
                raise _NoAnswerError(f"the reply was cut off at max_tokens ({self.config.max_tokens})")
            return choice.message.content or ""

        return [Reply(text=text, reason=reason) for text, reason, _ in self._batch(conversations, work)]

    async def _read(self, client: httpx.AsyncClient, messages: Sequence[object]) -> float:
        """P(yes) from the probabilities of the first token."""
        settings = {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        choice = await self._complete(client, messages, settings)
        if choice.logprobs is None or not choice.logprobs.content:
            raise _NoAnswerError("the server gives no token probabilities; set `votes: 8` (--judge-votes 8)")
        answer = p_yes_from_logprobs((t.token, t.logprob) for t in choice.logprobs.content[0].top_logprobs)
        if answer.p_yes is None:
            raise _NoAnswerError(answer.reason)
        return answer.p_yes

    async def _vote(self, client: httpx.AsyncClient, messages: Sequence[object]) -> float:
        """The share of yes among samples, of which at least half must be yes or no."""
        votes = []
        for seed in range(self.config.votes):
            choice = await self._complete(client, messages, {"temperature": 1, "max_tokens": 4, "seed": seed})
            votes.append(verdict_of(choice.message.content or ""))
        yes, no = votes.count(YES), votes.count(NO)
        if 2 * (yes + no) < len(votes):
            raise _NoAnswerError("most samples are neither yes nor no")
        return yes / (yes + no)

    async def _complete(
        self, client: httpx.AsyncClient, messages: Sequence[object], settings: Mapping[str, object]
    ) -> _Choice:
        """The only choice of a chat completion. Raises _NoAnswerError once retries do not help."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=self._wait,
            retry=retry_if_exception(_is_transient),
            before_sleep=self._count_retry,
            reraise=True,
        )
        body = {"model": self.config.model, "messages": messages, **settings}
        try:
            async for attempt in retrying:
                with attempt:
                    async with asyncio.timeout(self.config.timeout_s):
                        response = await client.post(self._endpoint, json=body)
                    response.raise_for_status()
            completion = _Completion.model_validate_json(response.content)
        except (httpx.HTTPError, TimeoutError) as error:
            raise _NoAnswerError(self._reason(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _NoAnswerError(f"the reply is no chat completion: {where} {first['msg']}") from error
        if completion.usage is not None:
            self.usage.prompt_tokens += completion.usage.prompt_tokens
            self.usage.completion_tokens += completion.usage.completion_tokens
        return completion.choices[0]

    def _batch(
        self, items: Sequence[Any], work: Callable[[httpx.AsyncClient, Any], Awaitable[T]]
    ) -> list[tuple[T | None, str | None, float]]:
        """`work` of every item: its result or the reason why there is none, and its seconds."""

        async def counted(client: httpx.AsyncClient, turn: asyncio.Semaphore, item: Any) -> Any:
            result, reason = None, None
            async with turn:
                began = time.perf_counter()
                try:
                    result = await work(client, item)
                except _NoAnswerError as error:
                    reason = str(error)
                seconds = time.perf_counter() - began
            self.usage.record(reason, seconds)
            return result, reason, seconds

        async def run() -> list[Any]:
            turn = asyncio.Semaphore(self.config.concurrency)
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
            # asyncio.timeout bounds the whole of a reply, which httpx's own limits do not.
            timeout = httpx.Timeout(None, connect=self.config.connect_s)
            limits = httpx.Limits(max_connections=self.config.concurrency)
            async with httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client:
                return await asyncio.gather(*(counted(client, turn, item) for item in items))

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(run())
        # A loop runs in this thread already, as it does in a notebook.
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, run()).result()

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next try. The random part keeps those that were refused together from coming together."""
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error.response) if isinstance(error, httpx.HTTPStatusError) else 0.0
        return min(asked, self.config.max_wait_s) + _backoff(state)

    def _count_retry(self, _: RetryCallState) -> None:
        self.usage.retries += 1

    def _reason(self, error: Exception) -> str:
        if isinstance(error, httpx.HTTPStatusError):
            text = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
        elif isinstance(error, TimeoutError):
            text = f"no whole reply within {self.config.timeout_s:g} s"
        else:
            text = f"{type(error).__name__}: {error}"
        # A server may repeat the key that it refuses.
        return text.replace(self._key, "***") if self._key else text


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError | TimeoutError)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that a server asks to wait (RFC 9110, section 10.2.3: a number or a date); 0 where it says nothing."""
    text = response.headers.get("Retry-After", "").strip()
    if response.status_code not in (429, 503) or not text:
        return 0.0
    if text.isdecimal():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


def served_models(url: str, api_key_env: str | None, timeout_s: float = 30.0) -> list[str]:
    """The names of a server's models. Raises RlhfImgError if it does not tell them."""
    key = _key(api_key_env)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else None
        response = httpx.get(_endpoint(url, "/models"), headers=headers, timeout=timeout_s)
        response.raise_for_status()
        return [model.id for model in _Models.model_validate_json(response.content).data]
    except (httpx.HTTPError, ValidationError) as error:
        what = "the reply is no list of models" if isinstance(error, ValidationError) else str(error) or repr(error)
        what = what.replace(key, "***") if key else what
        raise RlhfImgError(
            f"{url} does not say what models it has ({what}); see that the server is up, or give --judge-model NAME"
        ) from error


def _endpoint(url: str | None, path: str = "/chat/completions") -> str:
    try:
        parsed = httpx.URL(url or "")
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RlhfImgError(f"the judge's url is {url!r}; expected one such as http://localhost:8000/v1")
    return f"{parsed}".rstrip("/") + path


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise RlhfImgError(f"the judge's key should be in the environment variable {variable}, which is not set")
    return key


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    """PNG, because a lossy format would add the very defects that a judge is asked about."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
