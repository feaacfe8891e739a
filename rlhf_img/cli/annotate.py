"""`rlhf-img annotate`: people say which of two images is better."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_img.cli.serving import LOOPBACK, hosts_of, listening, run
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.training.annotation.candidates import Candidate
    from rlhf_img.training.annotation.store import Store


def annotate(
    data: Annotated[Path, typer.Argument(metavar="RUN|PAIRS", help="A run with samples, or preference pairs.")],
    store: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="Where answers are kept: a SQLite file, or postgresql://... "
                     "[default: answers.sqlite beside the data]"),
    ] = None,
    people: Annotated[int, typer.Option(min=1, help="How many people judge a pair.")] = 1,
    twice: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pairs that one more judges, to measure agreement.")
    ] = 0.1,
    count: Annotated[int, typer.Option(min=1, help="Pairs at most, the first ones.")] = 500,
    host: Annotated[str, typer.Option(help="Where to listen; anything else than this machine lets others in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8127,
    export: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write what people prefer as preference pairs, and stop.")
    ] = None,
    agreement: Annotated[bool, typer.Option("--agreement", help="Say how far people agree, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --export or --agreement: print JSON.")] = False,
) -> None:
    """Open a page on which people compare images: keys 1, 2, t (no difference) and s (skip).

    Of a run, its samples before, during and after training are compared; of pairs, their two images. Who made which is
    not shown, and left and right are by chance. Answers are on the disk at once: a stopped server goes on where it was.

    Examples:

        rlhf-img annotate runs/first

        rlhf-img annotate pairs --people 2 --store postgresql://user@host/labels

        rlhf-img annotate pairs --export human && rlhf-img dpo --pairs human --start runs/first
    """
    from rlhf_img.training.annotation.candidates import batch_of, read_candidates, wanted
    from rlhf_img.training.annotation.store import Store

    candidates = read_candidates(data, count)
    beside = data if data.is_dir() else data.parent
    kept = Store(store or str(beside / "answers.sqlite"), batch_of(candidates))
    kept.add(wanted(candidates, people, twice))
    if export is not None:
        _export(candidates, kept, export, as_json)
    elif agreement:
        _agreement(candidates, kept, as_json)
    else:
        _serve(candidates, kept, host, port)


def _export(candidates: "list[Candidate]", store: "Store", out: Path, as_json: bool) -> None:
    from rlhf_img.training.annotation.answers import preferences
    from rlhf_img.training.pairs import write_pairs

    pairs, undecided = preferences(candidates, store.labels())
    if not pairs:
        raise RlhfImgError("nobody has preferred an image yet: open the page without --export, and answer")
    file = out / "pairs-00000.parquet"
    if out.is_dir() and any(other != file for other in out.glob("*.parquet")):
        raise RlhfImgError(f"{out} holds other pairs: give another folder to --export")
    write_pairs(file, pairs)
    found = {"pairs": len(pairs), "undecided": undecided, "file": str(file)}
    typer.echo(json.dumps(found) if as_json else f"{len(pairs)} pairs written to {file}, {undecided} undecided")


def _agreement(candidates: "list[Candidate]", store: "Store", as_json: bool) -> None:
    from rlhf_img.training.annotation.answers import agreement

    found = agreement(candidates, store.labels())
    typer.echo(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))


def _serve(candidates: "list[Candidate]", store: "Store", host: str, port: int) -> None:
    try:
        import uvicorn  # noqa: F401 - whether it is there

        from rlhf_img.training.annotation.server import make_app
    except ImportError as error:
        raise RlhfImgError(f"the page needs a web server ({error}): pip install 'rlhf-img[annotate]'") from error
    with listening(host, port) as (bound, address):
        typer.echo(f"{len(candidates)} pairs on {address} (Ctrl-C stops; answers are kept)")
        if host not in LOOPBACK:
            typer.echo("everyone who can reach this machine can see the images and answer", err=True)
        run(make_app(candidates, store, hosts_of(host)), bound)
