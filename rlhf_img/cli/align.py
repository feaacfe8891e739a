"""`rlhf-img grpo`: train, measure, report."""

import json
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from rlhf_img.config import describe, from_mapping, load_yaml, merge, parse_overrides, to_mapping, versions
from rlhf_img.errors import RlhfImgError

_Config = TypeVar("_Config")


def grpo(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as `grpo.lr=1e-4`.")
    ] = None,
    rewards: Annotated[
        str | None, typer.Option(metavar="SPEC", help='Such as "rubric:2,artifact,my_rewards.py:neon".')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='"playground" (ships with the package), a diffusers folder, or a hub id.')
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Training prompts: .txt, .jsonl or .yaml.")] = None,
    eval_prompts: Annotated[Path | None, typer.Option(help="Held-out prompts, in the same formats.")] = None,
    config: Annotated[Path | None, typer.Option(help="A run file (YAML) with any settings.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/grpo-DATE-TIME].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    show_settings: Annotated[bool, typer.Option("--settings", help="List every setting and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Align a model with GRPO, measure it before and after on held-out prompts, and write a report.

    Precedence: key=value over options over --config over defaults.

    Examples:

        rlhf-img grpo --rewards rubric,artifact

        rlhf-img grpo --model krea/Krea-2-Raw --prompts prompts.txt --rewards my_rewards.py:neon grpo.lr=3e-4

        rlhf-img grpo --out runs/first --resume
    """
    if show_settings:
        _print_settings("grpo")
        return
    options = {
        "rewards": rewards, "model": model, "prompts": _text(prompts), "eval_prompts": _text(eval_prompts),
        "seed": seed,
    }  # fmt: skip
    given = merge(load_yaml(config) if config else {}, {k: v for k, v in options.items() if v is not None})
    given = merge(given, parse_overrides(settings or []))
    if resume and out is None:
        raise RlhfImgError("--resume needs --out with the folder of the run to go on with")
    _run("grpo", given, out, resume, as_json)


def _run(algorithm: str, given: dict[str, Any], out: Path | None, resume: bool, as_json: bool) -> None:
    """A run of an algorithm, which is a file of `training`, with the settings `given`, in the folder `out`."""
    from rich.console import Console

    from rlhf_img.report import build
    from rlhf_img.training.loop import train
    from rlhf_img.training.rundir import RunDir

    out = out or Path("runs") / time.strftime(f"{algorithm}-%Y%m%d-%H%M%S")
    room = import_module(f"rlhf_img.training.{algorithm}")
    console = Console(stderr=as_json)
    began = time.time()
    with RunDir.create(out, resume=resume) as run:
        if resume:
            config = _resumed(room.Config, run.read_config(), given)
        else:
            config = from_mapping(room.Config, given, "settings")
        _, job = room.prepare(config)
        run.write_config({
            "algorithm": algorithm, "command": shlex.join(["rlhf-img", *sys.argv[1:]]), "seed": config.seed,
            "config": to_mapping(config), "versions": versions(),
        })  # fmt: skip
        result = train(job, run, console)
    page = build([out], None)
    if as_json:
        typer.echo(json.dumps({**result, "report": str(page)}))
    else:
        _print_result(console, result, page, time.time() - began)


def _print_settings(algorithm: str) -> None:
    for item in describe(import_module(f"rlhf_img.training.{algorithm}").Config):
        typer.echo(f"{item.key} ({item.type}, default {item.default})\n    {item.doc}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _resumed(config: type[_Config], saved: dict[str, Any], given: dict[str, Any]) -> _Config:
    """The run's own settings; only `steps` may be changed, since anything else would make another run of it."""
    before = from_mapping(config, saved["config"], "the run's config.yaml")
    after = from_mapping(config, merge(saved["config"], given), "settings")
    old, new = to_mapping(before), to_mapping(after)
    changed = [key for key in old if old[key] != new[key] and key != "steps"]
    if changed:
        raise RlhfImgError(
            f"a resumed run keeps its settings, and {', '.join(changed)} would change: leave them out, "
            "or start a new run with another --out"
        )
    return after


def _print_result(console: Any, result: dict[str, Any], page: Path, seconds: float) -> None:
    from rich.table import Table

    before, after = result["checkpoints"]
    table = Table("held-out", "before", "after", "difference (95 % interval)")
    rows = [("all requirements met", "pass_all"), ("single requirements met", "pass_requirement")]
    for title, key in rows:
        change = result["difference"][key]
        table.add_row(
            title, f"{before[key]['mean']:.1%}", f"{after[key]['mean']:.1%}",
            f"{change['mean'] * 100:+.1f} points ({change['low'] * 100:+.1f} to {change['high'] * 100:+.1f})",
        )  # fmt: skip
    for name, change in result["difference"]["rewards"].items():
        if change["mean"] is None:
            continue
        table.add_row(
            f"reward: {name}", f"{before['rewards'][name]['mean']:.3f}", f"{after['rewards'][name]['mean']:.3f}",
            f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})",
        )  # fmt: skip
    ratio = result["difference"]["diversity_ratio"]
    table.add_row("diversity", "1", f"{ratio['mean']:.2f}", f"ratio {ratio['low']:.2f} to {ratio['high']:.2f}")
    console.print(table)
    console.print(f"{seconds / 60:.1f} minutes. Report: {page}", soft_wrap=True)
