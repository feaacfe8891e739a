"""`rlhf-img reward serve`: scores images for runs on other machines."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from rlhf_img.cli.serving import LOOPBACK, hosts_of, listening, run
from rlhf_img.errors import RlhfImgError

_MIB = 2**20


def serve(
    rewards: Annotated[
        str, typer.Option(metavar="SPEC", help='What to serve, such as "rubric,artifact" or "my_rewards.py:neon".')
    ] = "rubric,artifact",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML whose `rewards` are served, with options, as in a run.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; anything else than this machine lets others in: set a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8131,
    token_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the token that clients must bring, if set.")
    ] = "RLHF_IMG_REWARD_TOKEN",
    workers: Annotated[
        int, typer.Option(min=1, help="Requests scored at a time; more where rewards wait for a judge.")
    ] = 1,
    max_images: Annotated[int, typer.Option(min=1, help="Images a request.")] = 64,
    max_mib: Annotated[int, typer.Option(min=1, help="Size of a request in MiB.")] = 128,
) -> None:
    """Score images for runs on other machines, over HTTP: JSON and PNG, never a pickle.

    A run there trains with `--rewards remote:http://HOST:PORT/NAME`; the reward's range, role and floor are those that
    it declares here. Weights and judges are needed on this machine alone. Ctrl-C ends what has been begun, then stops.

    Examples:

        rlhf-img reward serve --rewards artifact

        RLHF_IMG_REWARD_TOKEN=... rlhf-img reward serve --rewards hpsv3,my_rewards.py:neon --host 0.0.0.0

        rlhf-img grpo --rewards rubric,remote:http://box:8131/artifact
    """
    from rlhf_img.config import load_yaml
    from rlhf_img.rewards import load_rewards

    try:
        import uvicorn  # noqa: F401 - whether it is there

        from rlhf_img.rewards.server import Limits, make_app
    except ImportError as error:
        raise RlhfImgError(f"serving needs a web server ({error}): pip install 'rlhf-img[remote]'") from error
    chosen = load_rewards(rewards if config is None else load_yaml(config).get("rewards") or [])
    token = os.environ.get(token_env, "").strip() or None
    limits = Limits(images=max_images, bytes=max_mib * _MIB, workers=workers)
    with listening(host, port) as (bound, address):
        app = make_app(chosen, limits, token, hosts_of(host))
        names = ", ".join(reward.name for reward in chosen)
        typer.echo(f"{names} on {address} (Ctrl-C stops); a run takes remote:{address}/{chosen[0].name}")
        if host not in LOOPBACK and token is None:
            typer.echo(f"everyone who can reach this machine can have images scored; set {token_env}", err=True)
        with suppress(KeyboardInterrupt):
            run(app, bound)
