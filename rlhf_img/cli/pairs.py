"""`rlhf-img pairs`: make preference pairs from a model, and look at any."""

import json
import re
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from rlhf_img.errors import RlhfImgError

app = typer.Typer(help="Preference pairs: two images of a prompt, of which one is preferred.", no_args_is_help=True)

_DATA = typer.Argument(metavar="DATA", help="A Parquet file of pairs, or a folder of them.")
_COLUMNS = typer.Option(metavar="MAP", help='Other column names: "prompt=caption,image_0=jpg_0,...".')


@app.command()
def make(
    out: Annotated[Path, typer.Option(help="The folder to write; if it holds some of these pairs, go on.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts [default: the playground's].")] = None,
    model: Annotated[str, typer.Option(help='"playground", a diffusers folder, or a hub id.')] = "playground",
    count: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 512,
    rewards: Annotated[
        str, typer.Option(metavar="SPEC", help='What ranks images, or "none" if two settings alone are believed.')
    ] = "rubric,artifact",
    group: Annotated[int, typer.Option(min=1, help="Images a prompt (with two settings: pairs a prompt).")] = 8,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of a group: best against worst, second best, ...")] = 1,
    min_margin: Annotated[float, typer.Option(help="Pairs whose rewards differ by less are left out.")] = 0.05,
    setting: Annotated[
        str, typer.Option(metavar="SETTING", help='How groups are drawn, such as "steps=16,guidance=2,lora=DIR".')
    ] = "steps=16",
    strong: Annotated[
        str | None, typer.Option(metavar="SETTING", help="With --weak: how the chosen images are drawn.")
    ] = None,
    weak: Annotated[
        str | None, typer.Option(metavar="SETTING", help="With --strong: the rejected ones, from the same noise.")
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only every N-th file from the I-th on, counted from 0.")
    ] = "0/1",
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw images and pair them: the best of a group against its worst, or a strong setting against a weak one.

    Pairs are written file by file in TRL's columns; a run that is stopped goes on when it is started again.

    Examples:

        rlhf-img pairs make --out pairs --rewards rubric,artifact

        rlhf-img pairs make --out delta --strong steps=28 --weak steps=4 --rewards none --group 1
    """
    from rich.progress import Progress

    from rlhf_img.config import from_mapping
    from rlhf_img.training import pair_making
    from rlhf_img.training.pairs import survey

    settings = {"setting": setting, "strong": strong, "weak": weak}
    config = from_mapping(pair_making.MakeConfig, {
        "model": model, "prompts": None if prompts is None else str(prompts), "count": count, "group": group,
        "rewards": None if rewards == "none" else rewards, "pairs": pairs, "min_margin": min_margin, "seed": seed,
        **{name: asdict(pair_making.parse_setting(text)) for name, text in settings.items() if text is not None},
    }, "pairs make")  # fmt: skip
    with Progress(transient=True, disable=as_json) as bar:
        task = bar.add_task("drawing pairs", total=None)
        made = pair_making.make(
            config, out, part=_part(shard), progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if as_json:
        typer.echo(json.dumps({**asdict(made), **asdict(survey(out))}))
        return
    typer.echo(f"{made.written} pairs written, {made.left_out} left out, {made.skipped} files were there already")
    typer.echo("\n".join(survey(out).lines()))


@app.command()
def stats(
    data: Annotated[Path, _DATA],
    columns: Annotated[str | None, _COLUMNS] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count pairs, prompts, sources, sizes, margins and the share with an on-policy image; name what cannot be used.

    Example: rlhf-img pairs stats my.parquet --columns prompt=caption,image_0=jpg_0,image_1=jpg_1,prefers_0=label_0
    """
    from rlhf_img.training.pairs import parse_columns, survey

    found = survey(data, parse_columns(columns))
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else "\n".join(found.lines()))


@app.command()
def show(
    data: Annotated[Path, _DATA],
    columns: Annotated[str | None, _COLUMNS] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("pairs.html"),
    count: Annotated[int, typer.Option(min=1, help="Pairs at most, the first ones.")] = 48,
) -> None:
    """Write a standalone HTML page with pairs side by side.

    Example: rlhf-img pairs show pairs --out pairs.html
    """
    from rlhf_img.report.pairs import PairView, build_pairs
    from rlhf_img.training.pairs import parse_columns, read_pairs, survey

    mapping = parse_columns(columns)
    facts = survey(data, mapping).lines()
    some = islice(read_pairs(data, mapping), count)
    views = [PairView(p.prompt, p.chosen, p.rejected, p.source, p.on_policy, p.margin) for p in some]
    typer.echo(build_pairs(views, f"Preference pairs: {data.name}", facts, out))


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise RlhfImgError(f'--shard is I/N with I below N, such as 0/4; got "{text}"')
    return int(match[1]), int(match[2])
