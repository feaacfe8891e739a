"""`rlhf-img sample` and `rlhf-img eval`: images of a model, and its scores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rlhf_img.model.loading import Model

_LORA = typer.Option(help="A LoRA folder to apply, such as a run's `lora`.")
_MODEL = typer.Option(help='"playground", a diffusers folder, or a hub id.')
_STEPS = typer.Option(min=1, help="Denoising steps.")
_GUIDANCE = typer.Option(min=0.0, help="Krea's g; 0 = off. The common scale w is 1 + g.")


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: Annotated[str, _MODEL] = "playground",
    lora: Annotated[Path | None, _LORA] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    steps: Annotated[int, _STEPS] = 16,
    guidance: Annotated[float, _GUIDANCE] = 0.0,
    images: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones follow.")] = 0,
) -> None:
    """Draw images.

    Example: rlhf-img sample "two red circles" "a blue star on black" --guidance 2 --lora runs/first/lora
    """
    from rlhf_img.model.conditioning import Conditioner
    from rlhf_img.rewards import Images
    from rlhf_img.training.prompts import Prompt
    from rlhf_img.training.samples import draw_images

    loaded = _load(model, lora)
    asked = [Prompt(p) for p in prompts for _ in range(images)]
    seeds = [seed + i for i in range(len(asked))]
    drawn = Images(draw_images(loaded, Conditioner(loaded), asked, seeds, num_steps=steps, guidance=guidance))
    out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(asked, drawn, strict=True)):
        image.save(out / f"{i:03d}.png")
        typer.echo(f"{out / f'{i:03d}.png'}  {prompt.text}")


def evaluate(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL...]", help="Models, or runs' folders.")] = None,
    rewards: Annotated[str, typer.Option(metavar="SPEC", help="What to score with.")] = "rubric,artifact",
    prompts: Annotated[Path | None, typer.Option(help="Held-out prompts [default: the playground's].")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 256,
    steps: Annotated[int, _STEPS] = 16,
    guidance: Annotated[float, _GUIDANCE] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score one or several models, or runs (what they trained), on held-out prompts with 95 % intervals.

    From the second on also what differs from the first one, prompt by prompt (`difference` in the JSON).

    Example: rlhf-img eval playground runs/first runs/second --count 512
    """
    from rich.console import Console
    from rich.progress import Progress

    from rlhf_img.model.conditioning import Conditioner
    from rlhf_img.rewards import load_rewards
    from rlhf_img.training.evaluate import EvalConfig, compare, summarise
    from rlhf_img.training.evaluate import evaluate as measure
    from rlhf_img.training.export import check_trained
    from rlhf_img.training.prompts import from_playground, read_prompts

    spec = load_rewards(rewards)
    spec += [] if any(r.name == "rubric" for r in spec) else load_rewards("rubric")
    asked = read_prompts(prompts)[:count] if prompts else from_playground("heldout", count)
    config = EvalConfig(prompts=count, num_steps=steps, guidance=guidance)
    models = models or ["playground"]
    for name in models:
        check_trained(name)
    results, first = [], None
    for name in models:
        loaded = _load(name, None)
        with Progress(transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=None)
            found, _ = measure(
                loaded, Conditioner(loaded), spec, asked, config,
                lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            )  # fmt: skip
        results.append(summarise(name, found) | ({"difference": compare(first, found)} if first else {}))
        first = first or found
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        _print_scores(results)


def _print_scores(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(str(result["name"]) for result in results))
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("all requirements met", ("pass_all",)),
        ("single requirements met", ("pass_requirement",)),
    ]
    rows += [(f"  {check}", ("by_check", check)) for check in results[0]["by_check"]]
    rows += [(f"reward: {name}", ("rewards", name)) for name in results[0]["rewards"]]
    rows += [("diversity", ("diversity",))]
    for title, path in rows:
        cells = []
        for result in results:
            change = _interval(result.get("difference", {}), path, sign="+")
            cells.append((_interval(result, path) or "-") + (f"\n{change}" if change else ""))
        table.add_row(title, *cells)
    Console().print(table)
    if len(results) > 1:
        typer.echo(f"Below each value, what differs from {results[0]['name']}, paired by prompt.")


def _interval(values: dict[str, Any], path: tuple[str, ...], sign: str = "") -> str:
    """The mean there, with its interval; empty if it is not known."""
    for key in path:
        values = values.get(key) or {}
    if values.get("mean") is None:
        return ""
    mean, low, high = (format(values[key], f"{sign}.3f") for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _load(name: str, lora: Path | None) -> "Model":
    """A model, or what a run has trained, with a LoRA on top."""
    from rlhf_img.model.export import load_lora, merge
    from rlhf_img.training.export import open_trained

    model = open_trained(name)
    if lora is not None:
        load_lora(model, lora, "lora")
        merge(model, "lora")
    return model
