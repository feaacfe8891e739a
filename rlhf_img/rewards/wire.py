"""What a run and a reward on another machine say to each other: JSON over HTTP, images as PNG, never a pickle.

    GET  /health          {"status": "ok", "protocol": 1}; asks for no token
    GET  /rewards         `Served`
    POST /rewards/NAME    `Request` -> `Reply`

Each image has a number, which its score brings back: in which order a server works changes nothing. Errors are
{"error": "what to do"} with a status of 4xx or 5xx; 429, 5xx and lost connections are worth another try.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_img.rubrics.schema import Rubric
from rlhf_img.rubrics.scoring import RubricResult

PROTOCOL: Literal[1] = 1
TOKEN = "RLHF_IMG_REWARD_TOKEN"
"""The environment variable that holds the token, on both machines."""


class _Message(BaseModel):
    # Fields that are not known are ignored: a later version may add some.
    model_config = ConfigDict(strict=True, frozen=True)


class Described(_Message):
    """A reward that is served; the fields are those of `Reward`. A bound of the range that is null is infinite."""

    name: str
    range: tuple[float | None, float | None]
    role: Literal["objective", "gate", "both", "measure"]
    group: bool
    floor: float
    below: float
    cap: float
    about: str
    needs: str


class Served(_Message):
    """What a server has, and the most that it takes in a request."""

    protocol: int
    version: str
    rewards: tuple[Described, ...]
    max_images: int
    max_bytes: int


class Item(_Message):
    """An image to be scored: base64 of a PNG. rubric: of its prompt, where the data set has one."""

    id: int
    prompt: str
    image: str
    rubric: Rubric | None = None


class Request(_Message):
    """Images of one size; of one prompt, for a reward that wants groups."""

    protocol: Literal[1]
    items: tuple[Item, ...]


class Score(_Message):
    """An image's score, or null with the reason: unscored is never 0. rubric: what a rubric's reward says besides."""

    id: int
    value: float | None
    reason: str | None = None
    rubric: RubricResult | None = None


class Reply(_Message):
    """One score for each image of the request, in any order."""

    protocol: Literal[1]
    scores: tuple[Score, ...]


def first_problem(error: ValidationError) -> str:
    """Where a message is wrong first, and how."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"
