"""The server of `rlhf-img reward serve`: scores what runs on other machines send. `wire` says how they speak."""

import asyncio
import base64
import hmac
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_img import __version__
from rlhf_img.errors import RlhfImgError, RunStopped, did_you_mean
from rlhf_img.rewards.protocol import Images, Reward
from rlhf_img.rewards.scoring import Scoring
from rlhf_img.rewards.wire import PROTOCOL, TOKEN, Described, Item, Reply, Request, Score, Served, first_problem
from rlhf_img.rubrics.schema import CUSTOM_CHECK
from rlhf_img.rubrics.scoring import RubricResult

_WAITING = 32
"""Requests held at a time; more are asked to come again. Each may be as large as a request may be."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a server takes on."""

    images: int = 64
    """Images a request."""
    bytes: int = 128 * 2**20
    """Length of a request."""
    pixels: int = 4096 * 4096
    """Of an image."""
    workers: int = 1
    """Requests scored at a time. More help rewards that wait for a judge, and must be borne by the rewards."""


def make_app(rewards: Sequence[Reward], limits: Limits, token: str | None, hosts: Sequence[str]) -> Starlette:
    """What answers. token: what a client must bring, if any. hosts: names under which the server may be reached, so
    that no browser is led to it under another; a request has to be JSON, which no page from elsewhere can send."""
    server = _Server({reward.name: reward for reward in rewards}, limits, token)
    routes = [
        Route("/health", _health),
        Route("/rewards", server.describe),
        Route("/rewards/{name}", server.score, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
                     exception_handlers={HTTPException: _refused})  # fmt: skip


async def _health(request: HttpRequest) -> Response:
    return JSONResponse({"status": "ok", "protocol": PROTOCOL})


async def _refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class _Server:
    def __init__(self, rewards: dict[str, Reward], limits: Limits, token: str | None) -> None:
        self.rewards, self.limits, self.token = rewards, limits, token
        self.turn, self.held = asyncio.Semaphore(limits.workers), 0

    async def describe(self, request: HttpRequest) -> Response:
        self._admit(request)
        served = Served(
            protocol=PROTOCOL, version=__version__, rewards=tuple(map(_described, self.rewards.values())),
            max_images=self.limits.images, max_bytes=self.limits.bytes,
        )  # fmt: skip
        return _json(served.model_dump_json())

    async def score(self, request: HttpRequest) -> Response:
        self._admit(request)
        reward = self.rewards.get(name := request.path_params["name"])
        if reward is None:
            raise HTTPException(404, f'no reward "{name}" is served; {did_you_mean(name, self.rewards)}')
        if self.held >= _WAITING:
            raise HTTPException(503, f"{self.held} requests are waiting: come again", {"Retry-After": "1"})
        self.held += 1
        try:
            body = await self._body(request)
            async with self.turn:
                if await request.is_disconnected():
                    return Response(status_code=408)  # nobody is waiting for these scores any more
                return _json(await run_in_threadpool(partial(_reply, reward, body, self.limits)))
        except ClientDisconnect:
            return Response(status_code=408)
        finally:
            self.held -= 1

    def _admit(self, request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token is not None and not hmac.compare_digest(given.encode(), self.token.encode()):
            raise HTTPException(401, f"the token is missing or wrong: set {TOKEN} to the server's")

    async def _body(self, request: HttpRequest) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "a request is JSON: send Content-Type: application/json")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limits.bytes:
                raise HTTPException(413, f"a request has at most {self.limits.bytes} bytes: send fewer images in one "
                                         f"(the option `images`), or serve with a higher --max-mib")
        return bytes(body)


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _described(reward: Reward) -> Described:
    low, high = (bound if math.isfinite(bound) else None for bound in reward.range)
    about = (reward.fn.__doc__ or "").strip().partition("\n")[0]
    return Described(
        name=reward.name, range=(low, high), role=reward.role, group=reward.group, floor=reward.floor,
        below=reward.below, cap=reward.cap, about=about, needs=reward.needs,
    )  # fmt: skip


def _reply(reward: Reward, body: bytes, limits: Limits) -> str:
    """The scores that a request asks for. Raises HTTPException for whatever is wrong with it."""
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["loc"] == ("protocol",):
            raise HTTPException(409, f"this server speaks version {PROTOCOL} of the reward protocol: install one "
                                     f"version of rlhf-img on both machines (here it is {__version__})") from error
        raise HTTPException(422, f"this is no request for scores: {first_problem(error)}") from error
    items = request.items
    if not 0 < len(items) <= limits.images:
        raise HTTPException(422, f"a request has 1 to {limits.images} images; given {len(items)}")
    for item in items:
        _refuse_files(item)
    try:
        images = Images.from_pil([_image(item, limits) for item in items])
        columns = {"rubrics": [item.rubric for item in items]}
        with Scoring([reward], len(items), [item.prompt for item in items], columns) as scoring:
            scoring.add(range(len(items)), images)
            verdicts = scoring.verdicts()[reward.name]
    except RunStopped as error:  # its judge is away
        raise HTTPException(503, str(error)) from error
    except RlhfImgError as error:
        raise HTTPException(422, str(error)) from error
    scores = tuple(
        Score(id=item.id, value=v.value, reason=v.reason,
              rubric=v.details if isinstance(v.details, RubricResult) else None)
        for item, v in zip(items, verdicts, strict=True)
    )  # fmt: skip
    return Reply(protocol=PROTOCOL, scores=scores).model_dump_json(exclude_defaults=True)


def _refuse_files(item: Item) -> None:
    """A check of a file is code on this machine; who sends an image does not choose what runs here."""
    for requirement in item.rubric.requirements if item.rubric is not None else ():
        if CUSTOM_CHECK.fullmatch(requirement.check):
            raise HTTPException(422, f"item {item.id}: the check {requirement.check} is a file's, and a server runs "
                                     f"only checks that are installed there: offer it in rlhf_img.checks")


def _image(item: Item, limits: Limits) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(item.image, validate=True)), formats=["PNG"])
        if image.width * image.height > limits.pixels:
            raise HTTPException(413, f"item {item.id}: {image.width} x {image.height} px, more than {limits.pixels}")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"item {item.id}: its image is no base64 of a whole PNG ({error})") from error
