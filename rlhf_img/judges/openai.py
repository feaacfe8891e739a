"""A judge behind an OpenAI-compatible server, such as vLLM or `transformers serve`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

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
from rlhf_img.judges.requests import png_base64, reason_of, secret_in, send

TOP_LOGPROBS = 20
"""The most that OpenAI's interface and vLLM give without further settings."""

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
        encoded = lru_cache(maxsize=self.config.concurrency)(lambda key: png_base64(images[key]))

        async def work(client: httpx.AsyncClient, ask: Ask) -> float:
            text = QUESTION.format(question=ask.question)
            image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(id(ask.image))}"}}
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
        body = {"model": self.config.model, "messages": messages, **settings}
        try:
            request = client.build_request("POST", self._endpoint, json=body)
            response = await send(client, request, self.config, self._count_retry)
            completion = _Completion.model_validate_json(response.content)
        except (httpx.HTTPError, TimeoutError) as error:
            raise _NoAnswerError(reason_of(error, self.config, self._key)) from error
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

    def _count_retry(self) -> None:
        self.usage.retries += 1


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
    return None if variable is None else secret_in(variable, "the judge's key")
