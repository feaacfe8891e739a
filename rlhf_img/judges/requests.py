"""Requests to a server that are tried again, after growing, random waits and after what the server asks for."""

import asyncio
import base64
import io
import os
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol, runtime_checkable

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from rlhf_img.errors import RlhfImgError

_backoff = wait_random_exponential(multiplier=0.5, max=20)


@runtime_checkable
class Patience(Protocol):
    """How long a request may take."""


    @property
    def timeout_s(self) -> float:
        """Seconds for a whole reply."""

    @property
    def attempts(self) -> int:
        """Tries of one request."""

    @property
    def max_wait_s(self) -> float:
        """The most seconds to wait because the server asks for it."""


async def send(
    client: httpx.AsyncClient, request: httpx.Request, patience: Patience, retried: Callable[[], None] = lambda: None
) -> httpx.Response:
    """The whole reply to a request. 429, 5xx, time-outs and lost connections are tried again; `retried` is told.

    Raises httpx.HTTPError or TimeoutError once no more tries are left or none would help.
    """

    def wait(state: RetryCallState) -> float:
        """Seconds until the next try. The random part keeps those that were refused together from coming together."""
        error = state.outcome.exception() if state.outcome else None
        asked = _retry_after(error.response) if isinstance(error, httpx.HTTPStatusError) else 0.0
        return min(asked, patience.max_wait_s) + _backoff(state)

    async for attempt in AsyncRetrying(
        stop=stop_after_attempt(patience.attempts), wait=wait, retry=retry_if_exception(_is_transient),
        before_sleep=lambda _: retried(), reraise=True,
    ):  # fmt: skip
        with attempt:
            # This bounds the whole of a reply, which httpx's own limits do not.
            async with asyncio.timeout(patience.timeout_s):
                response = await client.send(request)
            response.raise_for_status()
    return response


def reason_of(error: Exception, patience: Patience, secret: str | None) -> str:
    """Why `send` gave up, in a line. A server may repeat the secret that it refuses: it is left out."""
    if isinstance(error, httpx.HTTPStatusError):
        text = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
    elif isinstance(error, TimeoutError):
        text = f"no whole reply within {patience.timeout_s:g} s"
    else:
        text = f"{type(error).__name__}: {error}"
    return text.replace(secret, "***") if secret else text


def secret_in(variable: str, what: str) -> str:
    """The value of an environment variable. Raises RlhfImgError if it has none; `what` says whose it would be."""
    if not (secret := os.environ.get(variable, "").strip()):
        raise RlhfImgError(f"{what} should be in the environment variable {variable}, which is not set")
    return secret


def png_base64(image: npt.NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as text. PNG, because a lossy format would add the very defects that are asked about."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


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
