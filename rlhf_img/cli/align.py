"""`rlhf-img grpo`, `nft`, `dpo`, `tdm` and `sft`: train, measure, report."""

import json
import shlex
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rlhf_img.cli.needs import ALGORITHMS
from rlhf_img.cli.outcome import print_outcome
from rlhf_img.cli.processes import launch, started
from rlhf_img.config import describe, from_mapping, load_yaml, merge, parse_overrides, to_mapping, versions
from rlhf_img.errors import RlhfImgError, RunStopped

if TYPE_CHECKING:
    from rlhf_img.training.rundir import RunDir

_Config = TypeVar("_Config")

_RunFile = Annotated[Path | None, typer.Option("--config", help="A run file (YAML) with any settings.")]
_Seed = Annotated[int | None, typer.Option(help="Of everything random.")]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
_ShowSettings = Annotated[bool, typer.Option("--settings", help="List every setting and stop.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Processes = Annotated[
    int | None, typer.Option(min=1, help="On this machine, each with a share of the work [default: one a GPU; without "
                             "one, for the playground, one a core].")
]  # fmt: skip
_Model = Annotated[
    str | None, typer.Option(help='"playground" (ships with the package), a diffusers folder, or a hub id.')
]
_Prompts = Annotated[Path | None, typer.Option(help="Training prompts: a file, a dataset or a pool.")]
_EvalPrompts = Annotated[Path | None, typer.Option(help="Held-out prompts, in the same formats.")]
_Start = Annotated[
    str | None,
    typer.Option(metavar="RUN|FOLDER", help="Go on from this run's adapter, or a LoRA's [default: the model]."),
]


_ONLINE_HELP = {
    "grpo": """Align a model with GRPO, measure it before and after on held-out prompts, and write a report.

    Precedence: key=value over options over --config over defaults.

    Examples:

        rlhf-img grpo --rewards rubric,artifact

        rlhf-img grpo --model krea/Krea-2-Raw --prompts prompts.txt --rewards my_rewards.py:neon grpo.lr=3e-4

        rlhf-img grpo --start runs/dpo --rewards rubric,artifact

        rlhf-img grpo --prompts pool.sqlite pool.curriculum=true

        rlhf-img grpo --out runs/first --resume
    """,
    "nft": """Align a model with DiffusionNFT: as grpo, but good and bad images are fitted without a likelihood.

    Precedence: key=value over options over --config over defaults.

    Examples:

        rlhf-img nft --rewards rubric,artifact

        rlhf-img nft --rewards rubric,artifact nft.beta=0.1 nft.decay=slow

        rlhf-img nft --out runs/first --resume
    """,
}


def online(algorithm: str) -> Callable[..., None]:
    """The command of an algorithm that learns from rewards of images that it draws."""

    def command(
        settings: Annotated[
            list[str] | None,
            typer.Argument(metavar="[key=value ...]", help=f"Settings, such as `{algorithm}.lr=1e-4`."),
        ] = None,
        rewards: Annotated[
            str | None, typer.Option(metavar="SPEC", help='Such as "rubric:2,artifact,my_rewards.py:neon".')
        ] = None,
        model: _Model = None,
        start: _Start = None,
        prompts: _Prompts = None,
        eval_prompts: _EvalPrompts = None,
        config: _RunFile = None,
        out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/ALGORITHM-DATE-TIME].")] = None,
        seed: _Seed = None,
        processes: _Processes = None,
        resume: _Resume = False,
        show_settings: _ShowSettings = False,
        as_json: _AsJson = False,
    ) -> None:
        if show_settings:
            _print_settings(algorithm)
            return
        options = {
            "rewards": rewards, "model": model, "start": start, "prompts": _text(prompts),
            "eval_prompts": _text(eval_prompts), "seed": seed,
        }  # fmt: skip
        _run(algorithm, _started(_given(config, options, settings)), out, resume, as_json, processes)

    command.__doc__ = _ONLINE_HELP[algorithm]
    return command


def dpo(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as `dpo.loss=dpo`.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Preference pairs: a Parquet file or a folder of them.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="MAP", help='Other column names: "prompt=caption,image_0=jpg_0,...".')
    ] = None,
    rewards: Annotated[
        str | None, typer.Option(metavar="SPEC", help="What held-out images are measured by; nothing trains on it.")
    ] = None,
    model: _Model = None,
    start: _Start = None,
    eval_prompts: Annotated[
        Path | None, typer.Option(help="Held-out prompts [default: the playground's, or those of held-out pairs].")
    ] = None,
    config: _RunFile = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/dpo-DATE-TIME].")] = None,
    seed: _Seed = None,
    processes: _Processes = None,
    resume: _Resume = False,
    show_settings: _ShowSettings = False,
    as_json: _AsJson = False,
) -> None:
    """Align a model on preference pairs, measure it before and after on held-out prompts, and write a report.

    Precedence: key=value over options over --config over defaults.

    Examples:

        rlhf-img pairs make --out pairs && rlhf-img dpo --pairs pairs

        rlhf-img dpo --pairs pairs dpo.loss=dpo steps=200

        rlhf-img dpo --pairs human --start runs/first

        rlhf-img dpo --model krea/Krea-2-Raw --pairs pickapic.parquet
        --columns prompt=caption,image_0=jpg_0,image_1=jpg_1,prefers_0=label_0
    """
    if show_settings:
        _print_settings("dpo")
        return
    options = {
        "pairs": _text(pairs), "columns": columns, "rewards": rewards, "model": model, "start": start,
        "eval_prompts": _text(eval_prompts), "seed": seed,
    }  # fmt: skip
    _run("dpo", _started(_given(config, options, settings)), out, resume, as_json, processes)


def tdm(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as `tdm.guidance=3.5`.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="RUN|FOLDER|none", help="What aligned the model: a run, a LoRA's folder, or nothing."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help='"playground", a diffusers folder, or a hub id [default: that of the teacher\'s run].'),
    ] = None,
    rewards: Annotated[str | None, typer.Option(metavar="SPEC", help="What measures; it does not train.")] = None,
    prompts: _Prompts = None,
    eval_prompts: _EvalPrompts = None,
    config: _RunFile = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/tdm-DATE-TIME].")] = None,
    seed: _Seed = None,
    processes: _Processes = None,
    resume: _Resume = False,
    show_settings: _ShowSettings = False,
    as_json: _AsJson = False,
) -> None:
    """Distil a guided model into a student of 8 steps without guidance, from prompts alone, and measure it.

    Model, prompts and rewards are those of the teacher's run if nothing else is said.
    Precedence: key=value over options over --config over the teacher's run over defaults.

    Examples:

        rlhf-img tdm --teacher runs/first

        rlhf-img tdm --teacher none

        rlhf-img tdm --model krea/Krea-2-Raw --teacher runs/first/lora --prompts prompts.txt tdm.guidance=3.5

        rlhf-img tdm --out runs/turbo --resume
    """
    if show_settings:
        _print_settings("tdm")
        return
    options = {
        "teacher": None if teacher == "none" else teacher, "rewards": rewards, "model": model,
        "prompts": _text(prompts), "eval_prompts": _text(eval_prompts), "seed": seed,
    }  # fmt: skip
    given = _given(config, options, settings)
    if not resume:
        if teacher is None and "teacher" not in given:
            raise RlhfImgError("what is to be distilled? Give --teacher RUN, a LoRA's folder, or none (the bare model)")
        from rlhf_img.training.adapters import settings_of
        from rlhf_img.training.tdm import INHERITED

        given = merge(settings_of(given.get("teacher"), INHERITED), given)
    _run("tdm", given, out, resume, as_json, processes)


def sft(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings, such as `sft.lr=3e-4`.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images with a captions.jsonl or .csv (file, prompt), or a .txt each."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='Rendered by the playground instead: "striped", "warm" or "ring".'),
    ] = None,
    model: Annotated[str | None, typer.Option(help='"playground", a diffusers folder, or a hub id.')] = None,
    rewards: Annotated[str | None, typer.Option(metavar="SPEC", help="What measures; it does not train.")] = None,
    eval_prompts: Annotated[Path | None, typer.Option(help="Held-out prompts [default: captions of the data].")] = None,
    config: _RunFile = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/sft-DATE-TIME].")] = None,
    seed: _Seed = None,
    resume: _Resume = False,
    show_settings: _ShowSettings = False,
    as_json: _AsJson = False,
) -> None:
    """Teach a model captioned images, as a LoRA, by flow matching, and measure it before and after.

    Precedence: key=value over options over --config over defaults.

    Examples:

        rlhf-img sft --variant striped --out runs/striped

        rlhf-img sft --data pictures --model krea/Krea-2-Raw --rewards rubric sft.lr=1e-4

        rlhf-img sft --out runs/striped --resume
    """
    if show_settings:
        _print_settings("sft")
        return
    options = {
        "data": _text(data), "variant": variant, "rewards": rewards, "model": model,
        "eval_prompts": _text(eval_prompts), "seed": seed,
    }  # fmt: skip
    _run("sft", _given(config, options, settings), out, resume, as_json)


def _given(config: Path | None, options: dict[str, Any], settings: list[str] | None) -> dict[str, Any]:
    """What the user said: key=value over options over the run file."""
    given = merge(load_yaml(config) if config else {}, {k: v for k, v in options.items() if v is not None})
    return merge(given, parse_overrides(settings or []))


def _started(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with the model of the run that this one goes on from, if nothing else is said."""
    from rlhf_img.training.adapters import settings_of

    return merge(settings_of(given.get("start"), ("model",)), given)


def _processes(algorithm: str, given: dict[str, Any], resumed: Path | None, wanted: int | None) -> int:
    """As many as wanted; else one a GPU, and without one, for the embedded model, one a core, if the work divides."""
    import torch

    from rlhf_img.model.loading import PLAYGROUND

    room = import_module(f"rlhf_img.training.{algorithm}")
    saved = load_yaml(resumed / "config.yaml")["config"] if resumed and (resumed / "config.yaml").exists() else {}
    config = from_mapping(room.Config, merge(saved, given), "settings")
    if wanted is not None:
        config.check_processes(wanted)
        return wanted
    most = torch.cuda.device_count() or (torch.get_num_threads() if config.model == PLAYGROUND else 1)
    return next(n for n in range(most, 0, -1) if n == 1 or _divides(config, n))


def _divides(config: Any, processes: int) -> bool:
    try:
        config.check_processes(processes)
    except RlhfImgError:
        return False
    return True


def _run(
    algorithm: str, given: dict[str, Any], out: Path | None, resume: bool, as_json: bool, processes: int | None = 1
) -> None:
    """A run of an algorithm, which is a file of `training`, with the settings `given`, in the folder `out`.

    As `processes`, if it was not started as several already; None: as many as there is use for.
    """
    from rich.console import Console

    from rlhf_img.model.loading import default_device
    from rlhf_img.report import build
    from rlhf_img.training import distributed
    from rlhf_img.training.estimate import check_memory
    from rlhf_img.training.loop import train
    from rlhf_img.training.pool.run import with_own_pool

    if resume and out is None:
        raise RlhfImgError("--resume needs --out with the folder of the run to go on with")
    if processes != 1 and not started():
        launch(_processes(algorithm, given, out if resume else None, processes))
    room = import_module(f"rlhf_img.training.{algorithm}")
    began = time.time()
    with distributed.joined():
        first = distributed.is_first()
        out = distributed.gather(out or Path("runs") / time.strftime(f"{algorithm}-%Y%m%d-%H%M%S"))[0]
        console = Console(stderr=as_json, quiet=not first)
        with distributed.open_run(out, resume=resume) as run:
            config = _config(room.Config, run, given, resume)
            if algorithm in ALGORITHMS and distributed.world() == 1:
                check_memory(config, default_device())
            _, job = room.prepare(with_own_pool(config, run))
            run.write_config({
                "algorithm": algorithm, "command": shlex.join(["rlhf-img", *sys.argv[1:]]), "seed": config.seed,
                "config": to_mapping(config), "processes": distributed.world(), "versions": versions(),
            })  # fmt: skip
            try:
                result = train(job, run, console)
            except RunStopped:
                if first and (out / "metrics.jsonl").exists():
                    build([out], None)
                raise
    if not first:
        return
    page = build([out], None)
    if as_json:
        typer.echo(json.dumps({**result, "report": str(page)}))
    else:
        print_outcome(console, result, page, time.time() - began)


def _print_settings(algorithm: str) -> None:
    for item in describe(import_module(f"rlhf_img.training.{algorithm}").Config):
        typer.echo(f"{item.key} ({item.type}, default {item.default})\n    {item.doc}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _config(config: type[_Config], run: "RunDir", given: dict[str, Any], resume: bool) -> _Config:
    """The settings given; of a resumed run its own, of which only `steps`, `shard` and the sentinels, which do not
    train, may be changed: anything else would make another run of it."""
    if not resume:
        return from_mapping(config, given, "settings")
    saved = run.read_config()
    before = from_mapping(config, saved["config"], "the run's config.yaml")
    after = from_mapping(config, merge(saved["config"], given), "settings")
    old, new = to_mapping(before), to_mapping(after)
    changed = [key for key in old if old[key] != new[key] and key not in ("steps", "shard", "sentinels")]
    if changed:
        raise RlhfImgError(
            f"a resumed run keeps its settings, and {', '.join(changed)} would change: leave them out, "
            "or start a new run with another --out"
        )
    return after
