"""`rlhf-img prompts`: the pool that runs draw their prompts from, and what they have learnt of it."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_img.cli.facts import print_facts
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.training.pool.store import PoolFile
    from rlhf_img.training.prompts import Prompt

app = typer.Typer(
    help="The prompt pool: which prompts teach, which are solved or hopeless, and what they cover.",
    no_args_is_help=True,
)

_PLAYGROUND = "playground"
_BAR = 12
_Pool = Annotated[Path, typer.Argument(metavar="POOL", help="The pool's file, such as pool.sqlite.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(
    pool: _Pool,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help='Files (.txt, .jsonl, .yaml, .parquet, .sqlite), folders of datasets, '
                       '"playground" or "playground:heldout".'),
    ],
    column: Annotated[str, typer.Option(help="What the prompt is called in .jsonl files and datasets.")] = "prompt",
    count: Annotated[int, typer.Option(min=1, help="Prompts of the playground.")] = 4096,
    as_json: _AsJson = False,
) -> None:
    """Add prompts to a pool, which is made if there is none. What it has already, perhaps in another spelling, stays.

    Examples:

        rlhf-img prompts add pool.sqlite prompts.txt rubrics.yaml

        rlhf-img prompts add pool.sqlite parti.parquet --column Prompt

        rlhf-img prompts add pool.sqlite playground && rlhf-img grpo --prompts pool.sqlite pool.curriculum=true
    """
    from rlhf_img.rubrics import dump_rubrics
    from rlhf_img.training.pool.store import SUFFIX, PoolFile

    if pool.suffix != SUFFIX:
        raise RlhfImgError(f"a pool's name ends with {SUFFIX}, by which runs know it; given {pool}")
    read = [(source, _read(source, column, count)) for source in sources]  # all of it, before anything is written
    file, told = PoolFile.create(pool), []
    for source, prompts in read:
        rows = [(p.text, None if p.rubric is None else dump_rubrics([p.rubric])) for p in prompts]
        added, known = file.add(rows, source)
        told.append({"source": source, "added": added, "known": known})
    if as_json:
        typer.echo(json.dumps(told))
        return
    for one in told:
        typer.echo(f"{one['source']}: {one['added']} prompts added, {one['known']} were there")


def _read(source: str, column: str, count: int) -> "list[Prompt]":
    from rlhf_img.training.prompts import from_playground, read_prompts

    if source in (_PLAYGROUND, f"{_PLAYGROUND}:heldout"):
        return from_playground("train" if source == _PLAYGROUND else "heldout", count)
    return read_prompts(Path(source), column)


@app.command()
def stats(pool: _Pool, as_json: _AsJson = False) -> None:
    """Show what a pool holds and what its runs have learnt: difficulty, spread, what rests, what teaches most.

    Example: rlhf-img prompts stats pool.sqlite
    """
    from rlhf_img.training.pool.overview import overview
    from rlhf_img.training.pool.store import PoolFile
    from rlhf_img.training.pool.weights import PoolConfig

    found = overview(PoolFile(pool), PoolConfig())
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    print_facts(str(pool), found)


@app.command()
def dedup(
    pool: _Pool,
    similarity: Annotated[float, typer.Option(help="Share of pieces of four letters that two have in common.")] = 0.8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be retired.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Retire prompts that nearly repeat an earlier one, and ask for the same things by their rubrics.

    Example: rlhf-img prompts dedup pool.sqlite --similarity 0.7 --dry-run
    """
    from rlhf_img.training.pool.duplicates import near_duplicates
    from rlhf_img.training.pool.store import PoolFile
    from rlhf_img.training.prompts import of_entry

    file = PoolFile(pool)
    entries = file.entries()
    with _progress("comparing prompts", as_json) as progress:
        found = near_duplicates([of_entry(entry) for entry in entries], similarity, progress)
    if not dry_run:
        file.retire({entries[i].id: "duplicate" for i in found})
    pairs = [(entries[i].text, entries[kept].text) for i, kept in found.items()]
    if as_json:
        typer.echo(json.dumps([{"retired": one, "kept": other} for one, other in pairs]))
        return
    for one, other in pairs:
        typer.echo(f"{one}\n    repeats: {other}")
    typer.echo(f"{len(found)} of {len(entries)} prompts {'would be ' * dry_run}retired")


@app.command()
def retire(
    pool: _Pool,
    prompts: Annotated[Path | None, typer.Option(help="These: a file or dataset of prompts.")] = None,
    solved: Annotated[float | None, typer.Option(help="Those whose mean score is at least this, in [0, 1].")] = None,
    hopeless: Annotated[float | None, typer.Option(help="Those whose mean score is at most this.")] = None,
    least_groups: Annotated[int, typer.Option("--groups", min=1, help="Of those with so many groups or more.")] = 3,
    back: Annotated[bool, typer.Option("--back", help="Bring back all, or those of --prompts.")] = False,
    as_json: _AsJson = False,
) -> None:
    """Take prompts out of what runs draw from, or bring them back; what is known of them stays.

    A run with pool.curriculum=true rests what teaches nothing by itself, and tries it again later.

    Examples:

        rlhf-img prompts retire pool.sqlite --solved 0.98 --hopeless 0.02

        rlhf-img prompts retire pool.sqlite --prompts unwanted.txt

        rlhf-img prompts retire pool.sqlite --back
    """
    from rlhf_img.training.pool.normal import normal_form
    from rlhf_img.training.pool.overview import matching
    from rlhf_img.training.pool.store import PoolFile
    from rlhf_img.training.prompts import read_prompts

    if prompts is None and solved is None and hopeless is None and not back:
        raise RlhfImgError("which prompts? Give --solved SCORE, --hopeless SCORE or --prompts FILE, or --back")
    if back and (solved is not None or hopeless is not None):
        raise RlhfImgError("--back brings back all, or those of --prompts: leave --solved and --hopeless out")
    file = PoolFile(pool)
    entries = [e for e in file.entries(retired=True) if (e.retired is not None) == back]
    reasons: dict[int, str | None] = {}
    if prompts is not None:
        named = {normal_form(prompt.text) for prompt in read_prompts(prompts)}
        reasons |= {e.id: None if back else "by hand" for e in entries if normal_form(e.text) in named}
    elif back:
        reasons |= {e.id: None for e in entries}
    reasons |= matching(file, entries, solved=solved, hopeless=hopeless, least_groups=least_groups)
    file.retire(reasons)
    told = {"prompts": len(reasons), "back": back}
    typer.echo(json.dumps(told) if as_json else f"{len(reasons)} prompts {'brought back' if back else 'retired'}")


@app.command()
def coverage(
    pool: _Pool,
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Divide the pool anew into so many [default: as it is; at first 32].")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose text encoder tells what is alike [default: none, by words alone].")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Divide prompts into clusters of like ones, which runs draw from evenly, and show what is known of each.

    Examples:

        rlhf-img prompts coverage pool.sqlite --clusters 64

        rlhf-img prompts coverage pool.sqlite --model krea/Krea-2-Raw
    """
    from rlhf_img.training.pool.overview import coverage as clusters_of
    from rlhf_img.training.pool.store import PoolFile
    from rlhf_img.training.pool.weights import PoolConfig

    file = PoolFile(pool)
    undivided = not any(entry.cluster for entry in file.entries())
    if clusters is not None or model is not None or undivided:
        _divide(file, clusters, model, as_json)
    views = clusters_of(file, PoolConfig())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(view) for view in views]))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("cluster", "prompts", "of all", "", "of draws", "groups", "difficulty", "spread", "words")
    table.columns[3].min_width = _BAR
    widest = max((view.share for view in views), default=1.0)
    for v in views:
        table.add_row(
            str(v.cluster), str(v.prompts), f"{v.share:.1%}", "█" * round(_BAR * v.share / widest), f"{v.drawn:.1%}",
            str(v.groups), *("" if x is None else f"{x:.2f}" for x in (v.difficulty, v.spread)),
            escape(", ".join(v.words)),
        )  # fmt: skip
    Console().print(table)


def _divide(file: "PoolFile", clusters: int | None, model: str | None, quiet: bool) -> None:
    from rlhf_img.training.pool.clusters import by_encoder, by_words, cluster

    entries = file.entries()
    if not entries:
        raise RlhfImgError(f"the pool {file.path} has no prompt that is not retired; add some first")
    texts = [entry.text for entry in entries]
    with _progress("reading prompts", quiet) as progress:
        if model is None:
            vectors = by_words(texts)
        else:
            from rlhf_img.model.conditioning import Conditioner
            from rlhf_img.model.loading import load

            vectors = by_encoder(Conditioner(load(model)).encode, texts, progress)
        labels = cluster(vectors, min(32, len(texts)) if clusters is None else clusters)
    file.set_clusters({entry.id: label for entry, label in zip(entries, labels.tolist(), strict=True)})


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(transient=True, disable=quiet) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
