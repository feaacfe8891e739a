"""Prompts in: from a file or the playground, and which of them an iteration gets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.playground.data import prompts as playground_prompts
from rlhf_img.playground.scene import Split
from rlhf_img.rubrics import Rubric, load_rubrics


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with its own rubric where its file gives one."""

    text: str
    rubric: Rubric | None = None


def from_playground(split: Split, count: int) -> list[Prompt]:
    """Captions of a split of the playground; the same on every machine."""
    return [Prompt(text) for text in playground_prompts(split, count)]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: .txt (one a line), .jsonl (objects with "prompt") or .yaml (rubrics with "prompt").

    Raises RlhfImgError if the file is missing, of another kind, empty or holds a line that cannot be used.
    """
    readers = {".txt": _read_lines, ".jsonl": _read_jsonl, ".yaml": _read_rubrics, ".yml": _read_rubrics}
    if path.suffix not in readers:
        raise RlhfImgError(f'prompts are read from .txt, .jsonl or .yaml files; got "{path}"')
    if not path.is_file():
        raise RlhfImgError(f'there is no prompts file "{path}"; give the path of a .txt, .jsonl or .yaml file')
    found = [p for p in readers[path.suffix](path) if p.text.strip()]
    if not found:
        raise RlhfImgError(f'the prompts file "{path}" is empty; it needs at least one prompt')
    return list({p.text: p for p in found}.values())


def _read_lines(path: Path) -> list[Prompt]:
    return [Prompt(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_jsonl(path: Path) -> list[Prompt]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RlhfImgError(f"{path}, line {number}: not JSON ({error.msg}); give one object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            hint = did_you_mean("prompt", row) if isinstance(row, dict) and row else "it is no object"
            raise RlhfImgError(f'{path}, line {number}: each line needs a "prompt" that is text; {hint}')
        found.append(Prompt(row["prompt"]))
    return found


def _read_rubrics(path: Path) -> list[Prompt]:
    return [Prompt(rubric.prompt, rubric) for rubric in load_rubrics(path)]


def split_heldout(prompts: Sequence[Prompt], share: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a list that comes without a split.

    Raises RlhfImgError if there are too few to hold any out.
    """
    count = round(len(prompts) * share)
    if not 0 < count < len(prompts):
        raise RlhfImgError(
            f"{len(prompts)} prompts are too few to hold out {share:.0%} of them; give more, or --eval-prompts FILE"
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    return [prompts[i] for i in sorted(order[count:])], [prompts[i] for i in sorted(order[:count])]


def draw(prompts: Sequence[Prompt], count: int, step: int, seed: int) -> list[Prompt]:
    """The prompts of iteration `step`, counted from 0, as `turns` says."""
    return [prompts[i] for i in turns(len(prompts), count, step, seed)]


def turns(total: int, count: int, step: int, seed: int) -> list[int]:
    """Which `count` of `total` things iteration `step` gets: each once in random order, then again in another order.

    It depends on its arguments alone, so that a resumed run goes on as if it had not been stopped.
    """
    orders: dict[int, np.ndarray] = {}
    drawn = []
    for place in range(step * count, (step + 1) * count):
        epoch, index = divmod(place, total)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(total)
        drawn.append(int(orders[epoch][index]))
    return drawn
