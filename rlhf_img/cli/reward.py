"""`rlhf-img reward`: list the rewards there are, score images with them, train the ones that are learned.

`reward probe`, `reward serve` and `reward train` have files of their own.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_img.cli import aesthetic, probe, serve_reward, train_reward, train_sae
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.rewards import Images, Scores
    from rlhf_img.rubrics.schema import Rubric

app = typer.Typer(
    help="List rewards, score images, probe rewards for hacks, serve them, train the rewards that are learned.",
    no_args_is_help=True,
)
train_reward.app.command("sae")(train_sae.train_sae)
app.add_typer(train_reward.app, name="train")
app.command("probe")(probe.probe)
app.command("serve")(serve_reward.serve)
train_reward.app.command("aesthetic")(aesthetic.train)


@app.command("list")
def list_rewards(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every reward that can be asked for by name.

    Example: rlhf-img reward list
    """
    from rlhf_img.rewards import known_rewards

    rows = [_row(name, source) for name, source in known_rewards().items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "role", "range", "source", "what it scores", "weights it needs")
    for row in rows:
        table.add_row(*(row[key] for key in ("name", "role", "range", "source", "about", "needs")))
    Console().print(table)


@app.command("score")
def score_images(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files of one size.")],
    prompt: Annotated[str, typer.Option(help="What the images should show.")],
    rewards: Annotated[
        str, typer.Option(metavar="SPEC", help='Such as "rubric,artifact" or "my_rewards.py:neon".')
    ] = "rubric,artifact",
    rubric: Annotated[
        Path | None, typer.Option(help="A rubric file to use instead of decomposing the prompt.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score images with rewards, without training anything.

    Example: rlhf-img reward score a.png b.png --prompt "two red circles on grey" --rewards rubric,artifact
    """
    from rlhf_img.rewards import load_rewards, score

    chosen = load_rewards(rewards)
    batch = _open(images)
    columns: dict[str, list[Any]] = {} if rubric is None else {"rubrics": [_rubric(rubric)] * len(batch)}
    scores = score(chosen, [prompt] * len(batch), batch, columns, max_unscored=1.0)
    if as_json:
        typer.echo(json.dumps(_as_json(images, scores), indent=2))
        return
    _print_scores(images, scores)


def _row(name: str, source: str) -> dict[str, str]:
    """One line of the list; a plug-in that does not load is shown with the reason, not left out."""
    from rlhf_img.rewards import load_rewards

    try:
        (reward,) = load_rewards([{"reward": name}])
    except RlhfImgError as error:
        return {"name": name, "role": "-", "range": "-", "source": source, "needs": "-",
                "about": f"does not load: {error}"}
    low, high = reward.range
    about = (_doc(reward.fn) or "").strip().partition("\n")[0]
    return {"name": name, "role": reward.role, "range": f"{low:g} to {high:g}", "source": source, "about": about,
            "needs": reward.needs}


def _doc(fn: Callable[..., Any]) -> str | None:
    return fn.__doc__


def _open(paths: list[Path]) -> "Images":
    from PIL import Image, UnidentifiedImageError

    from rlhf_img.rewards import Images

    opened = []
    for path in paths:
        try:
            opened.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise RlhfImgError(f"{path} cannot be read as an image: {error}") from error
    return Images.from_pil(opened)


def _rubric(path: Path) -> "Rubric":
    from rlhf_img.rubrics.files import load_rubrics

    rubrics = load_rubrics(path)
    if len(rubrics) != 1:
        raise RlhfImgError(f"{path} holds {len(rubrics)} rubrics; one prompt is scored with one")
    return rubrics[0]


def _as_json(paths: list[Path], scores: "Scores") -> dict[str, Any]:
    rows = [[None if math.isnan(value) else value for value in row] for row in scores.values_BK.tolist()]
    return {
        "scores": [{"image": str(path), **dict(zip(scores.names, row, strict=True))}
                   for path, row in zip(paths, rows, strict=True)],
        "unscored": dict(scores.unscored),
        "seconds": dict(scores.seconds),
    }


def _print_scores(paths: list[Path], scores: "Scores") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("image", *scores.names)
    for path, row in zip(paths, scores.values_BK.tolist(), strict=True):
        table.add_row(str(path), *("unscored" if math.isnan(value) else f"{value:.3f}" for value in row))
    console = Console()
    console.print(table)
    for name, reasons in scores.unscored.items():
        for reason, count in reasons.items():
            console.print(f"{name}: {count} unscored: {reason}", markup=False)
