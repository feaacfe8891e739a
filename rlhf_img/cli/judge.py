"""The options by which a command is given a judge."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf_img.judges import Judge

Url = Annotated[
    str | None, typer.Option("--judge-url", help="Its OpenAI-compatible server, such as http://localhost:8000/v1.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--judge-model",
        help='Its model, which a server that has only one need not be told; without --judge-url a folder, hub id or '
        '"playground", run here.',
    ),
]
KeyEnv = Annotated[
    str | None,
    typer.Option("--judge-key-env", help="The environment variable with the server's key.", metavar="NAME"),
]


Votes = Annotated[
    int,
    typer.Option("--judge-votes", help="Samples a question, for a server that gives no token probabilities.", min=0),
]
Concurrency = Annotated[
    int, typer.Option("--judge-concurrency", help="Requests in flight at a time; questions in a batch here.", min=1)
]


def model_of(model: str | None, url: str | None, key_env: str | None) -> str | None:
    """The model of the options, or the only one that the server has; None if no judge is given.

    Raises RlhfImgError if the server does not say, or has several.
    """
    if model is not None or url is None:
        return model
    from rlhf_img.judges import only_model

    return only_model(url, key_env)


def open_given(
    model: str | None, url: str | None, key_env: str | None, votes: int = 0, concurrency: int = 32
) -> "Judge | None":
    """The judge of the options, None if none is given. Raises RlhfImgError if it cannot be opened."""
    name = model_of(model, url, key_env)
    if name is None:
        return None
    from rlhf_img.judges import JudgeConfig, open_judge

    return open_judge(JudgeConfig(model=name, url=url, api_key_env=key_env, votes=votes, concurrency=concurrency))
