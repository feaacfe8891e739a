"""`rlhf-img eval`: scores of models, and what becomes of LoRAs on another checkpoint."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_img.cli import look
from rlhf_img.errors import RlhfImgError


class _ModelsByDefault(TyperGroup):
    """`rlhf-img eval MODEL...` means `rlhf-img eval models MODEL...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["models", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ModelsByDefault,
    help="Scores of models or runs (`rlhf-img eval MODEL...`), and what becomes of LoRAs on another checkpoint.",
)
app.command("models")(look.evaluate)


@app.command()
def portability(
    loras: Annotated[
        Path, typer.Option(metavar="DIR", help="LoRAs: .safetensors files, their folders, or runs of `rlhf-img sft`.")
    ],
    source: Annotated[str, typer.Option("--from", metavar="RAW", help="The model that they were trained on.")],
    turbo: Annotated[
        str, typer.Option("--to", metavar="TURBO", help="Where they are to work: a model, or a run such as of tdm.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="For quality, and for LoRAs without prompts [default: the playground's].")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; --settings lists them.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Cosine from which a LoRA carries over.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for portability.json and the report [default: TURBO, if it is a run].")
    ] = None,
    show_settings: Annotated[
        bool, typer.Option("--settings", is_eager=True, callback=lambda given: _print_settings(given),
                           help="List every setting and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure whether LoRAs trained on Raw work on Turbo: same prompts and seeds, with and without, on both.

    Steps and guidance are those of a tdm run if TURBO is one. A LoRA's folder may hold a portability.yaml, which says
    what it is for: `target` (a reward that measures it), `prompts` (a file), `kind` (a word).

    Examples:

        rlhf-img eval portability --loras runs/loras --from playground --to runs/turbo

        rlhf-img eval portability --loras loras --from krea/Krea-2-Raw --to krea/Krea-2-Turbo --prompts prompts.txt
        --out ported --set features=facebook/dinov2-small --set steps=28
    """
    from rlhf_img.config import merge, parse_overrides

    if out is None and not (Path(turbo) / "config.yaml").is_file():
        raise RlhfImgError(f'"{turbo}" is no run: say with --out where portability.json and the report shall go')
    given = merge(parse_overrides(settings or []), {} if threshold is None else {"threshold": threshold})
    result, page = _measure(loras, source, turbo, prompts, given, out or Path(turbo), quiet=as_json)
    typer.echo(json.dumps({**result, "report": str(page)})) if as_json else _print(result, page)


def _measure(
    loras: Path, source: str, turbo: str, prompts: Path | None, given: dict[str, Any], folder: Path, *, quiet: bool
) -> tuple[dict[str, Any], Path]:
    """Writes portability.json and the report into `folder`; returns what the one holds and where the other is."""
    from rich.progress import Progress

    from rlhf_img.config import from_mapping, merge
    from rlhf_img.report import build
    from rlhf_img.training import portability as room
    from rlhf_img.training.export import open_trained

    given = merge(room.settings_for(turbo), given)
    config = from_mapping(room.PortabilityConfig, given, "portability")
    fallback = room.default_prompts(source, prompts, config.prompts)
    found = room.find_loras(loras, config, fallback)
    models = open_trained(source), open_trained(turbo)
    with room.open_folder(folder) as run, Progress(transient=True, disable=quiet) as bar:
        task = bar.add_task("carrying LoRAs over", total=len(found))
        result = room.portability(
            *models, found, fallback, config, lambda done, total: bar.update(task, completed=done),
            lambda name, drawn: room.write_grid(run, name, drawn),
        )  # fmt: skip
        result = {"from": source, "to": turbo, **result}
        run.write_json("portability.json", result)
    return result, build([folder])


def _print_settings(given: bool) -> bool:
    if given:
        from rlhf_img.config import describe
        from rlhf_img.training.portability import PortabilityConfig

        for item in describe(PortabilityConfig):
            typer.echo(f"{item.key} ({item.type}, default {item.default})\n    {item.doc}")
        raise typer.Exit
    return given


def _print(result: dict[str, Any], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    def cell(value: dict[str, Any] | None) -> str:
        known = value is not None and value["mean"] is not None
        return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})" if known and value else "-"

    last = f"cosine >= {result['threshold']:g}"
    table = Table("LoRA", "cosine of the changes", "size of the change", "target kept", last)
    for lora in result["loras"]:
        numbers = (cell(lora[key]) for key in ("cosine", "magnitude", "target_kept"))
        table.add_row(lora["name"], *numbers, lora["verdict"])
    console = Console()
    console.print(table)
    console.print(f"Report: {page}", soft_wrap=True)
