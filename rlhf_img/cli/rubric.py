"""`rlhf-img rubric`: make rubrics from prompts, check them, look at them, and score an image with one."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from rlhf_img import rubrics
from rlhf_img.cli import judge as options
from rlhf_img.config import from_mapping
from rlhf_img.errors import RlhfImgError
from rlhf_img.rubrics.files import read_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from rlhf_img.rubrics.detector import Detector
    from rlhf_img.rubrics.vision import Box

app = typer.Typer(
    help="Prompts as verifiable requirements: new, decompose, lint, show, score.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
def decompose(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts, each in quotes.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A text file with one prompt a line.", metavar="FILE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the YAML here rather than to the terminal.")] = None,
    decomposer: Annotated[
        Literal["grammar", "llm"], typer.Option(help="A grammar, at once and without a model; or a language model.")
    ] = "grammar",
    judge_url: options.Url = None,
    judge_model: options.Model = None,
    judge_key_env: options.KeyEnv = None,
    judge_concurrency: options.Concurrency = 32,
    cache: Annotated[
        Path | None, typer.Option(help="A folder with a file for each prompt; files that you edit win.", metavar="DIR")
    ] = None,
) -> None:
    """Turn prompts into rubrics (YAML). Words that no requirement covers are printed to stderr.

    Example: rlhf-img rubric decompose "two red circles left of a blue star on grey" --out rubric.yaml

    Example: rlhf-img rubric decompose --prompts prompts.txt --decomposer llm --judge-url http://localhost:8000/v1
    --judge-model Qwen/Qwen3-VL-8B-Instruct --cache rubrics-of-prompts --out rubrics.yaml
    """
    texts = [*(prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not texts:
        raise RlhfImgError("no prompt was given; expected one or more in quotes, or --prompts FILE")
    if decomposer == "grammar" and (judge_model or judge_url):
        raise RlhfImgError("the grammar asks no judge; give --decomposer llm, or leave the judge out")
    judge = options.open_given(judge_model, judge_url, judge_key_env, concurrency=judge_concurrency)
    found = rubrics.decompose_all(texts, decomposer, judge=judge, cache=cache, say=partial(typer.echo, err=True))
    for text, result in zip(texts, found, strict=True):
        if result.uncovered:
            typer.echo(f"not covered in {text!r}: {', '.join(result.uncovered)}", err=True)
    document = rubrics.dump_rubrics([result.rubric for result in found])
    if out is None:
        typer.echo(document, nl=False)
        return
    try:
        out.write_text(document, encoding="utf-8")
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error}") from error


def _read_prompts(path: Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not any(lines):
        raise RlhfImgError(f"{path} holds no prompt; expected one a line")
    return [line for line in lines if line]


@app.command()
def new(
    prompt: Annotated[str, typer.Argument(help="The prompt, in quotes.")],
    out: Annotated[Path, typer.Option(help="The file to write; one that exists is left alone.")] = Path("rubric.yaml"),
) -> None:
    """Write a commented rubric for one prompt: what the grammar found in it, and what is left for you to add.

    Example: rlhf-img rubric new 'a poster reading "OPEN", no people' --out poster.yaml
    """
    found = rubrics.decompose(prompt)
    left = [f"#   {{id: {i}, check: vqa, ask: ...}}   # {word!r}" for i, word in enumerate(found.uncovered, start=1)]
    text = _NEW_HEAD + rubrics.dump_rubrics([found.rubric])
    if left:
        head = "# Words of the prompt that no requirement covers; ask about them, or leave them:"
        text += "\n".join([head, *left, ""])
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RlhfImgError(f"{out} exists and is left as it is; give another --out") from error
    except OSError as error:
        raise RlhfImgError(f"{out} cannot be written: {error}") from error
    typer.echo(f"{out}: {len(found.rubric.requirements)} requirements, {len(found.uncovered)} words left to you")


_NEW_HEAD = """\
# A rubric: one verifiable requirement a line. After a change: rlhf-img rubric lint FILE
#   check:  object | count | color | size | relation | background | style | text | vqa | my_checks.py:name
#   needs:  [ids] without which this one means nothing; its score is capped by theirs
#   must: true caps the total where it fails; weight: 2 counts twice; expect: absent asks for what must not be there
#   permits: [grain, noise, blur, vignette] is asked for here, and so is no defect to the artifact reward
#   Put equals in quotes: YAML reads a bare NO, on, 12:30 or 007 as something else.
"""


@app.command()
def lint(
    files: Annotated[list[Path], typer.Argument(help="Rubric files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a finding.")] = False,
) -> None:
    """Check rubric files: every finding with line, column and how to mend it. Errors end with exit code 2.

    Example: rlhf-img rubric lint my-rubrics/*.yaml
    """
    found = [(path, finding) for path in files for finding in rubrics.lint(read_text(path))]
    if as_json:
        typer.echo(json.dumps([{"file": str(path), **dataclasses.asdict(f)} for path, f in found], indent=2))
    else:
        for path, finding in found:
            typer.echo(f"{path}:{finding}")
    errors = sum(f.severity == "error" for _, f in found)
    if errors:
        raise RlhfImgError(f"{errors} error{'s' * (errors != 1)} in {len(files)} file{'s' * (len(files) != 1)}")
    if not as_json:
        typer.echo(f"{len(files)} file{'s' * (len(files) != 1)} ok, {len(found)} warning{'s' * (len(found) != 1)}")


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A rubric file.", metavar="RUBRIC")]) -> None:
    """Print rubrics as a table, and what needs what as a tree.

    Example: rlhf-img rubric show rubric.yaml
    """
    console = Console()
    for rubric in rubrics.load_rubrics(path):
        console.print(_table(rubric), _tree(rubric))


def _table(rubric: rubrics.Rubric) -> Table:
    from rlhf_img.rubrics.scoring import describe

    table = Table(title=escape(rubric.prompt), title_justify="left")
    for column in ("id", "check", "says", "weight", "must", "permits"):
        table.add_column(column, justify="right" if column == "weight" else "left")
    for r in rubric.requirements:
        row = (r.id, r.check, describe(r), f"{r.weight:g}", "must" if r.must else "", ", ".join(r.permits))
        table.add_row(*(escape(cell) for cell in row))
    return table


def _tree(rubric: rubrics.Rubric) -> Tree:
    """A requirement hangs under each one that it needs."""
    tree = Tree("needs")

    def grow(branch: Tree, need: str | None) -> None:
        for r in rubric.requirements:
            if (need is None and not r.needs) or need in r.needs:
                grow(branch.add(escape(r.id)), r.id)

    grow(tree, None)
    return tree


@app.command()
def score(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    path: Annotated[Path, typer.Argument(help="A rubric file.", metavar="RUBRIC")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a list with one result a rubric.")] = False,
    judge_url: options.Url = None,
    judge_model: options.Model = None,
    judge_key_env: options.KeyEnv = None,
    judge_votes: options.Votes = 0,
    judge_concurrency: options.Concurrency = 32,
    detector: Annotated[
        str | None,
        typer.Option(help="A folder or the name of an OWLv2, OWL-ViT or Grounding DINO, asked before the judge."),
    ] = None,
    detector_threshold: Annotated[
        float | None, typer.Option(help="Score in (0, 1) from which on one of its boxes is the thing.")
    ] = None,
) -> None:
    """Score an image with every rubric of a file. A detector and a judge are asked what the checks cannot tell.

    Example: rlhf-img rubric score picture.png rubric.yaml --json

    Example: rlhf-img rubric score picture.png rubric.yaml --judge-url http://localhost:8000/v1
    --judge-model Qwen/Qwen3-VL-8B-Instruct

    Example: rlhf-img rubric score picture.png rubric.yaml --detector google/owlv2-base-patch16-ensemble
    """
    pixels = _read_image(image)
    loaded = rubrics.load_rubrics(path)
    judge = options.open_given(judge_model, judge_url, judge_key_env, judge_votes, judge_concurrency)
    finder = _open_detector(detector, detector_threshold)
    results = rubrics.score_all(loaded, [pixels] * len(loaded), judge, finder)
    if as_json:
        found = [{"prompt": r.prompt, **dataclasses.asdict(s)} for r, s in zip(loaded, results, strict=True)]
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    for rubric, result in zip(loaded, results, strict=True):
        console.print(_score_table(rubric.prompt, result))


def _open_detector(model: str | None, threshold: float | None) -> "Detector | None":
    if model is None:
        if threshold is not None:
            raise RlhfImgError("--detector-threshold needs --detector: the model whose boxes it is for")
        return None
    from rlhf_img.rubrics.detector import DetectorConfig, open_detector

    settings = {"model": model} | ({} if threshold is None else {"threshold": threshold})
    return open_detector(from_mapping(DetectorConfig, settings, "detector"))


def _read_image(path: Path) -> "npt.NDArray[np.uint8]":
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise RlhfImgError(f"{path}: cannot be read as an image: {error}") from error


def _percent(box: "Box") -> str:
    """A box in percent of the image: "x 10-30 %, y 40-55 %"."""
    left, top, right, bottom = (round(100 * side) for side in box)
    return f"x {left}-{right} %, y {top}-{bottom} %"


def _score_table(prompt: str, result: rubrics.RubricResult) -> Table:
    total = "unscored" if result.total is None else f"{result.total:.2f}, {'pass' if result.passed else 'fail'}"
    table = Table(title=escape(f"{prompt}: {total}"), title_justify="left")
    for column in ("id", "says", "score", "", "evidence"):
        table.add_column(column, justify="right" if column == "score" else "left")
    for r in result.requirements:
        value = "unscored" if r.score is None else f"{r.score:.2f}"
        verdict = {True: "[green]pass[/]", False: "[red]fail[/]", None: ""}[r.passed]
        where = "".join(f"\nat {_percent(box)}" for box in r.boxes)
        table.add_row(escape(r.id), escape(r.text), value, verdict, escape(r.evidence + where))
    return table
