"""`rlhf-img reward probe`: what cheap hacks of an image gain from a reward."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_img.errors import RunStopped

if TYPE_CHECKING:
    from rlhf_img.training.probing import Finding


def probe(
    rewards: Annotated[
        str, typer.Option(metavar="SPEC", help='Such as "rubric,artifact" or "my_rewards.py:neon".')
    ] = "rubric,artifact",
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Images with prompts: a run's samples, or a.txt beside a.png "
                     "[default: the playground's, right, wrong and damaged]."),
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images of each kind.")] = 48,
    trials: Annotated[
        int, typer.Option(min=0, help="Scores of each image that the noise may ask for, a reward; 0: no noise.")
    ] = 40,
    seed: Annotated[int, typer.Option(help="Of the playground's images and the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Save a picture of every probe here.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if what a run maximises gains.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every probe on every kind of image.")] = False,
    list_probes: Annotated[bool, typer.Option("--list", help="Show the probes and stop.")] = False,
) -> None:
    """Score images before and after hacks that should gain nothing: written words, borders, tiles, an empty scene, ...

    A probe "gains" if the 95 % interval of its mean gain lies above the reward's floor on one kind of image at least,
    and "holds" if it lies at or below it on all. A run with gates maximises the objectives under them: their own rows.

    Example: rlhf-img reward probe --rewards rubric,my_rewards.py:neon --out probes --strict
    """
    if list_probes:
        _list(as_json)
        return
    from rich.progress import Progress

    from rlhf_img.rewards import load_rewards
    from rlhf_img.training import probing

    chosen = load_rewards(rewards)
    kinds = probing.playground_baselines(count, seed) if images is None else [probing.read_baseline(images, count)]
    with Progress(transient=True, disable=as_json) as bar:
        task = bar.add_task("probing")
        findings = probing.probe(chosen, kinds, trials=trials, seed=seed,
                                 progress=lambda done, total: bar.update(task, completed=done, total=total))
    worst = probing.overall(findings)
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(worst)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        probing.picture(chosen, kinds, trials=trials, seed=seed).save(out / "probes.png")
        typer.echo(out / "probes.png", err=as_json)
    gaining = [f"{f.view} from {f.probe}" for f in worst if f.maximised and f.verdict == "gains"]
    if strict and gaining:
        raise RunStopped(f"a hack pays: {'; '.join(gaining)}. Mend the reward, or put a gate beside it")


def _list(as_json: bool) -> None:
    from rlhf_img.rewards.probes import NOISE, PROBES, adversarial_noise

    docs = {name: change.__doc__ for name, change in PROBES.items()} | {NOISE: adversarial_noise.__doc__}
    about = {name: " ".join((doc or "").partition("\n\n")[0].split()) for name, doc in docs.items()}
    if as_json:
        typer.echo(json.dumps(about, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("probe", "what it does")
    for row in about.items():
        table.add_row(*row)
    Console().print(table)


def _print(findings: "list[Finding]") -> None:
    """One line for each reward and probe: the kind of image on which it pays most."""
    from rich.console import Console
    from rich.table import Table

    colors = {"gains": "red", "holds": "green", "cannot tell": "yellow"}
    console = Console()
    for view in dict.fromkeys(f.view for f in findings):
        table = Table("probe", "images", "before", "gain (95 %)", "n", "pays", "verdict",
                      title=view, title_justify="left")
        for f in (f for f in findings if f.view == view):
            known = f.before is not None and f.share is not None
            gain = f"{f.gain['mean']:+.3f} ({f.gain['low']:+.3f}, {f.gain['high']:+.3f})" if known else "-"
            table.add_row(f.probe, f.baseline, f"{f.before:.2f}" if known else "-", gain, str(f.gain["n"]),
                          f"{f.share:.0%}" if known else "-", f"[{colors[f.verdict]}]{f.verdict}[/]")
        console.print(table)
    maximised = ", ".join(dict.fromkeys(f.view for f in findings if f.maximised))
    console.print(f"images: the kind on which it gains most. pays: share of them that gain more than the floor.\n"
                  f"A run with these rewards maximises: {maximised}.", markup=False)
