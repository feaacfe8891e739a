"""The options by which a command is given a judge."""

from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.judges import Judge

Url = Annotated[
    str | None, typer.Option("--judge-url", help="Its OpenAI-compatible server, such as http://localhost:8000/v1.")
]
Model = Annotated[
    str | None,
    typer.Option("--judge-model", help='Its model; without --judge-url a folder, hub id or "playground", run here.'),
]
KeyEnv = Annotated[
    str | None,
    typer.Option("--judge-key-env", help="The environment variable with the server's key.", metavar="NAME"),
]


def require_model(model: str | None, url: str | None) -> None:
    """Raises RlhfImgError for a server without a model."""
    if url is not None and model is None:
        raise RlhfImgError("--judge-url needs --judge-model: the name that the server gives its model")


def open_given(model: str | None, url: str | None, key_env: str | None) -> "Judge | None":
    """The judge of the options, None without a model. Raises RlhfImgError if it cannot be opened."""
    require_model(model, url)
    if model is None:
        return None
    from rlhf_img.judges import JudgeConfig, open_judge

    return open_judge(JudgeConfig(model=model, url=url, api_key_env=key_env))
