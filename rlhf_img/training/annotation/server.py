"""The web page on which people judge pairs: a small local server, on Starlette."""

import io
import json
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rlhf_img.errors import RlhfImgError
from rlhf_img.training.annotation.answers import agreement
from rlhf_img.training.annotation.candidates import Candidate
from rlhf_img.training.annotation.databases import StoreFailed
from rlhf_img.training.annotation.store import Choice, Label, Store

_SIDES = ("left", "right")
_LONGEST_NAME = 40


def make_app(candidates: Sequence[Candidate], store: Store, hosts: Sequence[str]) -> Starlette:
    """The page and what it asks for. `hosts`: the names under which the server may be reached.

    A browser that was led here under another name is refused, and an answer has to be JSON, which a page from elsewhere
    cannot send unasked: so no other site can answer in somebody's name.
    """
    known = {candidate.id: candidate for candidate in candidates}
    routes = [
        Route("/", _page),
        Route("/next", partial(_next, known, store), methods=["POST"]),
        Route("/answer", partial(_answer, known, store), methods=["POST"]),
        Route("/agreement", partial(_agreement, known, store)),
        Route("/image/{pair}/{side}", partial(_image, known)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
                     exception_handlers={StoreFailed: _away, RlhfImgError: _refused})  # fmt: skip


async def _page(request: Request) -> Response:
    page = resources.files("rlhf_img.training.annotation") / "page.html"
    return HTMLResponse(page.read_text(encoding="utf-8"), headers={
        # Nothing from elsewhere, and no scripts but the page's own.
        "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
        "Cache-Control": "no-store",
    })  # fmt: skip


async def _next(known: dict[str, Candidate], store: Store, request: Request) -> Response:
    annotator = _name((await _body(request)).get("annotator"))
    pair = store.take(annotator)
    state: dict[str, object] = {**store.progress(annotator)._asdict(), "pair": pair}
    if pair is not None:
        state |= {"prompt": known[pair].prompt,
                  **{side: f"/image/{pair}/{side}?annotator={annotator}" for side in _SIDES}}
    return JSONResponse(state)


async def _answer(known: dict[str, Candidate], store: Store, request: Request) -> Response:
    body = await _body(request)
    annotator, pair, answer = _name(body.get("annotator")), body.get("pair"), body.get("answer")
    if pair not in known:
        raise RlhfImgError("this pair is not among those to be judged")
    left = known[pair].left_image(annotator)
    choices: dict[str, Choice] = {"left": "1" if left else "0", "right": "0" if left else "1", "tie": "tie",
                                  "skip": "skip"}
    if answer not in choices:
        raise RlhfImgError(f"an answer is one of {', '.join(choices)}")
    seconds = body.get("seconds")
    took = float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else 0.0
    new = store.record(Label(pair, annotator, choices[answer], left, took))
    return JSONResponse({"kept": True, "new": new})


async def _agreement(known: dict[str, Candidate], store: Store, request: Request) -> Response:
    return JSONResponse({"lines": agreement(known.values(), store.labels()).lines()})


async def _image(known: dict[str, Candidate], request: Request) -> Response:
    pair, side = request.path_params["pair"], request.path_params["side"]
    if pair not in known or side not in _SIDES:
        raise RlhfImgError("there is no such image")
    left = known[pair].left_image(_name(request.query_params.get("annotator")))
    data = known[pair].images[left if side == "left" else 1 - left]
    with Image.open(io.BytesIO(data)) as image:
        kind = Image.MIME[image.format or "PNG"]
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600",
                                                    "X-Content-Type-Options": "nosniff"})


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _away(request: Request, error: Exception) -> Response:
    """The page asks again."""
    return JSONResponse({"error": str(error)}, status_code=503)


async def _body(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise RlhfImgError("an answer is JSON")
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise RlhfImgError(f"an answer is JSON: {error}") from error
    if not isinstance(body, dict):
        raise RlhfImgError("an answer is a JSON object")
    return body


def _name(given: object) -> str:
    """The name of who judges: short, of letters, digits, and a few signs that mean nothing in a URL."""
    name = given.strip() if isinstance(given, str) else ""
    if not 0 < len(name) <= _LONGEST_NAME or not all(sign.isalnum() or sign in "-_. " for sign in name):
        raise RlhfImgError(f"a name has 1 to {_LONGEST_NAME} letters, digits, spaces, dots or dashes")
    return name
