"""A reward on another machine, which `rlhf-img reward serve` runs: the client."""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx
from pydantic import ValidationError

from rlhf_img.config import from_mapping
from rlhf_img.errors import RlhfImgError, RunStopped, did_you_mean
from rlhf_img.judges.requests import png_base64, reason_of, secret_in, send
from rlhf_img.rewards.protocol import Images, Verdict
from rlhf_img.rewards.wire import PROTOCOL, TOKEN, Described, Item, Reply, Request, Served, first_problem
from rlhf_img.rubrics.schema import Rubric


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How a remote reward is asked, and what becomes of images that get no answer."""

    images: int = 8
    """Images a request; fewer if the server takes fewer, and a whole group for a reward that wants groups."""
    concurrency: int = 4
    """Requests in flight at a time."""
    connect_s: float = 5.0
    """Seconds to reach the server."""
    timeout_s: float = 120.0
    """Seconds for a whole reply, with the time that the request waits for its turn there."""
    attempts: int = 8
    """Tries of one request; 429, 5xx, time-outs and lost connections are tried again."""
    max_wait_s: float = 60.0
    """The most seconds to wait before a retry because the server asks for it (`Retry-After`)."""
    on_failure: Literal["unscored", "stop"] = "unscored"
    """Once no try is left, images are unscored, and `max_unscored` says when the run stops; or it stops at once."""
    token_env: str | None = None
    """The environment variable that holds the server's token; null: RLHF_IMG_REWARD_TOKEN, if it is set."""

    def __post_init__(self) -> None:
        for name in ("images", "concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1; given {getattr(self, name)}")
        if self.connect_s <= 0 or self.timeout_s <= 0 or self.max_wait_s < 0:
            raise ValueError("connect_s and timeout_s are above 0, and max_wait_s is at least 0")


class RemoteReward:
    """Asks a server for the scores of images, several requests at a time.

    What the reward declares there (range, role, floor, ...) is declared here. Of the columns, rubrics are sent. Scores,
    reasons and results of rubrics come back; other details, such as heat maps, do not. Images go as 8 bits, rounded.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """`url`, such as http://box:8131/artifact: server and the name there. options: the fields of `RemoteConfig`.

        Raises RlhfImgError if it cannot be reached, refuses the token, or has no such reward.
        """
        self.config = from_mapping(RemoteConfig, options, f"remote reward {url}")
        self.url, server, asked = _parsed(url)
        self._token = _token(self.config)
        # Proxies of the environment are for the web; a reward's machine is reached as it is named.
        self._verify = httpx.create_ssl_context() if self.url.startswith("https:") else False
        self._served = self._describe(server)
        found = {described.name: described for described in self._served.rewards}
        if asked not in found:
            raise RlhfImgError(f'{server} serves no reward "{asked}"; {did_you_mean(asked, found)}')
        self._take(found[asked])
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    def _take(self, served: Described) -> None:
        low, high = served.range
        self.range = (-math.inf if low is None else low, math.inf if high is None else high)
        self.name, self.role, self.group, self.floor = served.name, served.role, served.group, served.floor
        self.below, self.cap, self.needs = served.below, served.cap, f"{self.url}: {served.needs}"

    async def __call__(
        self, prompts: Sequence[str], images: Images, *, rubrics: Sequence[Rubric | None] | None = None,
        **columns: object,
    ) -> list[Verdict]:  # fmt: skip
        """Raises RunStopped if a request fails for good and `on_failure` says so."""
        asked = rubrics if rubrics is not None else [None] * len(images)
        length = min(len(images) if self.group else self.config.images, self._served.max_images)
        if self.group and len(images) > length:
            raise RlhfImgError(f"{self.url} wants whole groups, of {len(images)} images, and its server takes {length} "
                               f"a request: start it with --max-images {len(images)}")
        # One for all calls in this loop: several batches may be in flight.
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.config.concurrency))
        transport = httpx.AsyncHTTPTransport(verify=self._verify)
        timeout = httpx.Timeout(None, connect=self.config.connect_s)
        async with httpx.AsyncClient(transport=transport, timeout=timeout, headers=self._headers()) as client:
            parts = [range(start, min(start + length, len(images))) for start in range(0, len(images), length)]
            answers = await asyncio.gather(*(self._ask(client, turn, rows, prompts, images, asked) for rows in parts))
        return [verdict for answer in answers for verdict in answer]

    async def _ask(
        self, client: httpx.AsyncClient, turn: asyncio.Semaphore, rows: range, prompts: Sequence[str], images: Images,
        rubrics: Sequence[Rubric | None],
    ) -> list[Verdict]:  # fmt: skip
        """What the server says of the images at `rows`."""
        async with turn:
            body = await asyncio.to_thread(_encoded, rows, prompts, images, rubrics)
            try:
                response = await send(client, client.build_request("POST", self.url, content=body), self.config)
                reply = Reply.model_validate_json(response.content)
            except (httpx.HTTPError, TimeoutError) as error:
                return self._failed(rows, reason_of(error, self.config, self._token))
            except ValidationError as error:
                return self._failed(rows, f"the reply is none: {first_problem(error)}")
        found = {score.id: score for score in reply.scores}
        if len(found) != len(reply.scores) or found.keys() != set(rows):
            return self._failed(rows, "the reply scores other images than were sent")
        return [Verdict(value=found[i].value, reason=found[i].reason, details=found[i].rubric) for i in rows]

    def _failed(self, rows: range, reason: str) -> list[Verdict]:
        if self.config.on_failure == "stop":
            raise RunStopped(f"the reward at {self.url} gave no scores: {reason}. Mend it, then go on with --resume")
        return [Verdict(value=None, reason=reason)] * len(rows)

    def _headers(self) -> dict[str, str]:
        bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Content-Type": "application/json", **bearer}

    def _describe(self, server: str) -> Served:
        """What the server has. Raises RlhfImgError if it does not say so, or speaks another protocol."""
        try:
            transport = httpx.HTTPTransport(verify=self._verify)
            with httpx.Client(transport=transport, timeout=self.config.connect_s, headers=self._headers()) as client:
                response = client.get(f"{server}/rewards")
            response.raise_for_status()
            served = Served.model_validate_json(response.content)
        except httpx.HTTPError as error:
            raise RlhfImgError(
                f"{server} does not say what rewards it has ({reason_of(error, self.config, self._token)}); start it "
                f"there with: rlhf-img reward serve --rewards NAME"
            ) from error
        except ValidationError as error:
            raise RlhfImgError(f"{server} is no reward server: {first_problem(error)}") from error
        if served.protocol != PROTOCOL:
            raise RlhfImgError(
                f"{server} speaks version {served.protocol} of the reward protocol, and this is version {PROTOCOL}: "
                f"install one version of rlhf-img on both machines (there it is {served.version})"
            )
        return served


def _encoded(rows: range, prompts: Sequence[str], images: Images, rubrics: Sequence[Rubric | None]) -> str:
    items = tuple(
        Item(id=i, prompt=prompts[i], image=png_base64(images.arrays[i]), rubric=rubrics[i]) for i in rows
    )
    return Request(protocol=PROTOCOL, items=items).model_dump_json(by_alias=True, exclude_defaults=True)


def _parsed(url: str) -> tuple[str, str, str]:
    """The address to send images to, the server's, and the reward's name there."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        good = False
    if not good or not (name := parts.path.strip("/").rpartition("/")[2]):
        raise RlhfImgError(f'"remote:{url}" is no address of a reward; expected one such as '
                           f"remote:http://box:8131/artifact")
    if parts.username is not None:
        raise RlhfImgError(f"{url.replace(parts.netloc, '...')}: a token in an address ends up in files; put it into "
                           f"the environment variable {TOKEN}")
    server = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(name).rstrip('/')}"
    return f"{server}/rewards/{name}", server, name


def _token(config: RemoteConfig) -> str | None:
    if config.token_env is not None:
        return secret_in(config.token_env, "the reward server's token")
    return os.environ.get(TOKEN, "").strip() or None
