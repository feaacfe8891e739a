"""The `llm` decomposer: a language model turns prompts into requirements, and no reply counts before it is checked."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_img.judges import Judge, Message
from rlhf_img.rubrics.grammar import Decomposition
from rlhf_img.rubrics.schema import (
    BUILTIN_CHECKS,
    NEEDED_FIELDS,
    OPTIONAL_FIELDS,
    Requirement,
    Rubric,
    Source,
    prompt_sha,
)

TEMPLATE = "v1"
ATTEMPTS = 3
"""How often a prompt is asked about; from the second time on with what was wrong with the reply before."""


class _Reply(BaseModel):
    """What the model replies."""

    model_config = ConfigDict(extra="forbid")
    requirements: tuple[Requirement, ...]
    uncovered: tuple[str, ...]


class LlmDecomposer:
    """Decomposes prompts with a judge that can hold a conversation; of its `replies`, `rejected` were not valid."""

    def __init__(self, judge: Judge) -> None:
        self._judge, self.model = judge, judge.id
        self.replies = 0
        self.rejected = 0

    def decompose(self, prompts: Sequence[str]) -> list[Decomposition | str]:
        """For each prompt its decomposition, or the reason why there is none. Raises RunStopped as the judge does."""
        system = {"role": "system", "content": template()}
        talks: list[list[Message]] = [[system, {"role": "user", "content": f"Prompt: {p}"}] for p in prompts]
        results: list[Decomposition | str] = [""] * len(prompts)
        for _ in range(ATTEMPTS):
            open_ones = [i for i, result in enumerate(results) if isinstance(result, str)]
            said = self._judge.chat([talks[i] for i in open_ones], reply_schema()) if open_ones else []
            for i, reply in zip(open_ones, said, strict=True):
                if reply.text is None:
                    results[i] = reply.reason or "no reply"
                    continue
                results[i] = result = self._read(prompts[i], reply.text)
                if isinstance(result, str):
                    mend = f"That reply is not valid: {result}\nReply again with the whole JSON object, mended."
                    talks[i] += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": mend}]
        return results

    def _read(self, prompt: str, text: str) -> Decomposition | str:
        """The decomposition that a reply holds, or what is wrong with it."""
        self.replies += 1
        try:
            reply = _Reply.model_validate_json(text)
            # Other names are code to be run, which is not a model's to choose.
            if strange := sorted({r.check for r in reply.requirements} - set(BUILTIN_CHECKS)):
                raise ValueError(f"no check is called {', '.join(strange)}")
            if not reply.requirements and not reply.uncovered:
                raise ValueError("it says nothing about the prompt")
            source = Source(
                decomposer="llm",
                model=self.model,
                template=template_version(),
                prompt_sha=prompt_sha(prompt),
            )
            rubric = Rubric(prompt=prompt, requirements=reply.requirements, source=source)
        except ValidationError as error:
            self.rejected += 1
            return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        except ValueError as error:
            self.rejected += 1
            return str(error)
        return Decomposition(rubric=rubric, uncovered=reply.uncovered)


@lru_cache(maxsize=1)
def template() -> str:
    """What the model is told before the prompt, with examples."""
    return (files("rlhf_img.rubrics") / "llm_templates" / f"{TEMPLATE}.txt").read_text(encoding="utf-8")


def template_version() -> str:
    """Name and content hash, so that no change of the text goes unseen."""
    return f"{TEMPLATE}-{hashlib.sha256(template().encode()).hexdigest()[:8]}"


def reply_schema() -> dict[str, Any]:
    """JSON schema of a reply, in the strict form that servers can enforce: every field required, and no other.

    Made from `Requirement`: one shape for each check, with the arguments that it takes.
    """
    requirement = {"anyOf": [_shape(check) for check in BUILTIN_CHECKS]}
    words = {"type": "array", "items": {"type": "string"}}
    return _strict({"requirements": {"type": "array", "items": requirement}, "uncovered": words})


def _shape(check: str) -> dict[str, Any]:
    fields = Requirement.model_json_schema()["properties"]
    text = {"type": "string"}
    shape = {"id": fields["id"], "check": {"type": "string", "enum": [check]}}
    shape |= {name: text for name in NEEDED_FIELDS[check]}
    shape |= {name: {"anyOf": [text, {"type": "null"}]} for name in OPTIONAL_FIELDS.get(check, ())}
    if check == "count":
        shape["equals"] = {"type": "integer"}
    if check in ("object", "style", "vqa"):
        shape["expect"] = {"type": "string", "enum": fields["expect"]["enum"]}
    shape["needs"] = {"type": "array", "items": text}
    if check in ("style", "vqa"):
        shape["permits"] = {"type": "array", "items": text}
    return _strict(shape)


def _strict(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
