"""Prompts in: from a file or the playground, and which of them an iteration gets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.playground.data import prompts as playground_prompts
from rlhf_img.playground.scene import Split
from rlhf_img.rubrics import Rubric, load_rubrics
from rlhf_img.rubrics.files import parse_rubrics
from rlhf_img.training.pool.store import SUFFIX, Entry, PoolFile


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with its own rubric where its file gives one."""

    text: str
    rubric: Rubric | None = None


def from_playground(split: Split, count: int) -> list[Prompt]:
    """Captions of a split of the playground; the same on every machine."""
    return [Prompt(text) for text in playground_prompts(split, count)]


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are far apart from those before."""
FORMATS = ".txt, .jsonl, .yaml, .parquet, a dataset's folder, or a pool (.sqlite)"


def read_prompts(path: Path, column: str = "prompt") -> list[Prompt]:
    """Prompts of a file: .txt (one a line), .jsonl (objects with "prompt"), .yaml (rubrics with "prompt"), .parquet (a
    column "prompt"), a folder of these or of a dataset that `datasets` saved, or a prompt pool (.sqlite).

    column: its name in .jsonl and datasets. Raises RlhfImgError if the file is missing, of another kind, empty or holds
    a line that cannot be used.
    """
    readers: dict[str, Callable[[Path], list[Prompt]]] = {
        ".txt": _read_lines, ".jsonl": partial(_read_jsonl, column=column), ".yaml": _read_rubrics,
        ".yml": _read_rubrics, ".parquet": partial(_read_dataset, column=column), SUFFIX: _read_pool,
    }  # fmt: skip
    reader = partial(_read_dataset, column=column) if path.is_dir() else readers.get(path.suffix)
    if reader is None:
        raise RlhfImgError(f'prompts are read from {FORMATS}; got "{path}"')
    if not path.exists():
        raise RlhfImgError(f'there is no prompts file "{path}"; give the path of {FORMATS}')
    found = [p for p in reader(path) if p.text.strip()]
    if not found:
        raise RlhfImgError(f'the prompts file "{path}" is empty; it needs at least one prompt')
    return list({p.text: p for p in found}.values())


def of_entry(entry: Entry) -> Prompt:
    """A prompt of a pool."""
    if entry.rubric is None:
        return Prompt(entry.text)
    return Prompt(entry.text, parse_rubrics(entry.rubric, f"the rubric of prompt {entry.id}")[0])


def _read_lines(path: Path) -> list[Prompt]:
    return [Prompt(line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]


def _read_jsonl(path: Path, column: str) -> list[Prompt]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RlhfImgError(f"{path}, line {number}: not JSON ({error.msg}); give one object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            hint = did_you_mean(column, row) if isinstance(row, dict) and row else "it is no object"
            raise RlhfImgError(f'{path}, line {number}: each line needs a "{column}" that is text; {hint}')
        found.append(Prompt(row[column]))
    return found


def _read_rubrics(path: Path) -> list[Prompt]:
    return [Prompt(rubric.prompt, rubric) for rubric in load_rubrics(path)]


def _read_dataset(path: Path, column: str) -> list[Prompt]:
    """A Parquet file, or the files of a folder: Parquet, or the Arrow streams of `datasets`' save_to_disk."""
    files = [path] if path.is_file() else sorted(path.glob("*.parquet")) or sorted(path.glob("*.arrow"))
    if not files:
        raise RlhfImgError(f"{path} holds no .parquet or .arrow file; give a dataset's folder with one split")
    return [Prompt(text.strip()) for file in files for text in _texts(file, column)]


def _texts(file: Path, column: str) -> list[str]:
    try:
        if file.suffix == ".parquet":
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
        else:
            stream = pa.ipc.open_stream(file)
            schema = stream.schema
        if column not in schema.names:
            raise RlhfImgError(f'{file} has no column "{column}"; {did_you_mean(column, schema.names)}')
        if not pa.types.is_string(kind := schema.field(column).type) and not pa.types.is_large_string(kind):
            raise RlhfImgError(f'{file}: the column "{column}" holds {kind} and no text; say which does with --column')
        table = parquet.read([column]) if file.suffix == ".parquet" else stream.read_all()
    except (OSError, pa.ArrowException) as error:
        raise RlhfImgError(f"{file} is no readable dataset: {str(error).splitlines()[0]}") from error
    return [text for text in table[column].to_pylist() if text is not None]


def _read_pool(path: Path) -> list[Prompt]:
    return [of_entry(entry) for entry in PoolFile(path).entries()]


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


def turns(lengths_N: Int[np.ndarray, " N"], count: int, step: int, seed: int) -> list[int]:
    """Which `count` of N things with these lengths iteration `step`, counted from 0, gets: of about one length, so that
    they share a forward. Iterations that follow each other have all lengths in turn, short and long as they come.

    In an epoch each thing has one turn, but for fewer than `count` that are left over, which are others in every epoch.
    It depends on its arguments alone, so that a resumed run goes on as if it had not been stopped.
    """
    each = max(len(lengths_N) // count, 1)
    epoch, index = divmod(step, each)
    rng = np.random.default_rng((seed, epoch))
    order = np.resize(rng.permutation(len(lengths_N)), each * count)  # again from the start where N < count
    alike = order[np.argsort(lengths_N[order], kind="stable")].reshape(each, count)
    spread = (np.arange(each) * GOLDEN + rng.random()) % 1  # any few that follow each other are far apart in [0, 1)
    return [int(i) for i in alike[spread.argsort().argsort()[index]]]
