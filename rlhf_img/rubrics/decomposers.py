"""One way to all decomposers, with a cache of one file a prompt, which may be edited by hand."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Judge
from rlhf_img.rubrics.files import dump_rubrics, load_rubrics
from rlhf_img.rubrics.grammar import Decomposition, decompose
from rlhf_img.rubrics.llm import LlmDecomposer, template_version
from rlhf_img.rubrics.schema import Rubric, Source, prompt_sha

log = logging.getLogger(__name__)

CHUNK = 64
"""Prompts that are asked about before what came of them is written down."""


def decompose_all(
    prompts: Sequence[str],
    decomposer: Literal["grammar", "llm"] = "grammar",
    *,
    judge: Judge | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = log.warning,
) -> list[Decomposition]:
    """The decomposition of each prompt.

    judge: whom `llm` asks. cache: a folder with one YAML file a prompt. A file that was edited by hand is used as it
    is; another one is made anew if decomposer, model or template have changed. say: told of edits and of rejected
    replies.

    Raises RlhfImgError if a prompt got no valid reply (those that did are in the cache), or if a file is not a rubric
    of its prompt; RunStopped if the judge fails too often.
    """
    if decomposer == "llm" and judge is None:
        raise RlhfImgError("the decomposer llm asks a judge: give --judge-model, and --judge-url if a server has it")
    llm = LlmDecomposer(judge) if judge is not None and decomposer == "llm" else None
    done = {} if cache is None else _read_cache(cache, prompts, llm, say)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
    failed: list[str] = []
    for start in range(0, len(missing), CHUNK):
        part = missing[start : start + CHUNK]
        for prompt, result in zip(part, llm.decompose(part) if llm else map(decompose, part), strict=True):
            if isinstance(result, str):
                failed.append(f"  {prompt!r}: {result}")
            else:
                done[prompt] = result if cache is None else _store(cache, result)
    if llm is not None and llm.rejected:
        share = llm.rejected / llm.replies
        say(f"{llm.rejected} of {llm.replies} replies ({share:.0%}) were not valid and were asked for again")
    if failed:
        kept = f"the others are in {cache}" if cache else "with a cache folder the others would be kept"
        count = f"{len(failed)} of {len(missing)} prompts got no valid reply"
        raise RlhfImgError("\n".join([f"{count}; {kept}. Run it again for:", *failed[:5]]))
    return [done[prompt] for prompt in prompts]


def _read_cache(
    cache: Path, prompts: Sequence[str], llm: LlmDecomposer | None, say: Callable[[str], None]
) -> dict[str, Decomposition]:
    """What need not be made: files that were edited, and replies of the same model to the same template."""
    kept: dict[str, Decomposition] = {}
    edited = []
    for prompt in dict.fromkeys(prompts):
        if not (path := _path(cache, prompt)).exists():
            continue
        rubric = _load(path, prompt)
        source = rubric.source or Source()
        if source.content_sha != _content_sha(rubric):
            edited.append(path.name)
        elif llm is None or (source.model, source.template) != (llm.model, template_version()):
            continue
        kept[prompt] = Decomposition(rubric=rubric, uncovered=source.uncovered)
    if edited:
        say(f"{cache}: edited by hand and used as they are: {', '.join(edited)}")
    return kept


def _path(cache: Path, prompt: str) -> Path:
    return cache / f"{prompt_sha(prompt)}.yaml"


def _load(path: Path, prompt: str) -> Rubric:
    found = load_rubrics(path)
    if [rubric.prompt for rubric in found] != [prompt]:
        raise RlhfImgError(f"{path}: expected the one rubric of the prompt {prompt!r}; mend the file or delete it")
    return found[0]


def _store(cache: Path, result: Decomposition) -> Decomposition:
    """Writes the file and gives what will be read from it."""
    made = {"uncovered": result.uncovered, "content_sha": _content_sha(result.rubric)}
    source = (result.rubric.source or Source()).model_copy(update=made)
    rubric = result.rubric.model_copy(update={"source": source})
    path = _path(cache, rubric.prompt)
    partial = path.with_suffix(".partial")  # an interrupted write must not look like an edit
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial.write_text(dump_rubrics([rubric]), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RlhfImgError(f"{path} cannot be written: {error}") from error
    return Decomposition(rubric=rubric, uncovered=result.uncovered)


def _content_sha(rubric: Rubric) -> str:
    """Hash of all but the source; the file's layout and comments do not count."""
    return hashlib.sha256(dump_rubrics([rubric.model_copy(update={"source": None})]).encode()).hexdigest()[:12]
