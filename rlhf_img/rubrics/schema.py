"""What a rubric may hold, and what its parts must agree on. Reading and writing files is in `files`."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WrapValidator,
    model_validator,
)

from rlhf_img.errors import did_you_mean

BUILTIN_CHECKS = ("object", "count", "color", "relation", "size", "background", "style", "text", "vqa")
CUSTOM_CHECK = re.compile(r".+\.py:\w+")
NEEDED_FIELDS: dict[str, tuple[str, ...]] = {
    "object": ("target",),
    "count": ("target", "equals"),
    "color": ("target", "equals"),
    "relation": ("subject", "is", "object"),
    "size": ("target", "equals"),
    "background": ("equals",),
    "style": ("equals",),
    "text": ("equals",),
    "vqa": ("ask",),
}
"""The arguments that each built-in check takes."""
_ARGUMENTS = ("target", "equals", "subject", "is", "object", "ask")
OPTIONAL_FIELDS: dict[str, tuple[str, ...]] = {"text": ("target",), "vqa": ("target",)}
"""Those that it may take besides."""

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Requirement(_Model):
    """One verifiable statement. Which arguments it takes depends on `check`; every other one is an error.

    `equals` is a whole number for `count` and a string elsewhere. `needs` are ids of requirements without which
    this one means nothing: its score is capped by theirs. `permits` are artifact classes that are asked for here.
    `via` says who scores: the check itself (`cv`, `ocr`), an object detector (`detector`) or a judge (`vlm`). Without
    it the check does; where it cannot tell a detector, if there is one; and where that cannot either a judge.
    """

    id: Id
    check: str
    target: str | None = None
    equals: StrictBool | StrictInt | StrictStr | None = None
    subject: str | None = None
    relation: str | None = Field(
        default=None, validation_alias=AliasChoices("is", "relation"), serialization_alias="is"
    )
    object: str | None = None
    expect: Literal["present", "absent"] = "present"
    ask: str | None = None
    needs: tuple[str, ...] = ()
    must: bool = False
    weight: Annotated[float, Field(gt=0)] = 1.0
    permits: tuple[str, ...] = ()
    extra_text: Literal["penalize", "ignore"] = "penalize"
    via: Literal["cv", "ocr", "detector", "vlm"] | None = None

    @model_validator(mode="after")
    def _arguments_fit_check(self) -> "Requirement":
        if self.check not in NEEDED_FIELDS:
            _require_known_check(self.check)
            return self
        problem = _wrong_arguments(
            self.check, self.target is not None, self.equals is not None, self.subject is not None,
            self.relation is not None, self.object is not None, self.ask is not None,
        )  # fmt: skip
        if problem:
            raise ValueError(problem)
        if self.expect == "absent" and self.check not in ("object", "style", "vqa"):
            raise ValueError(f"expect: absent fits the checks object, style and vqa, not {self.check}")
        if self.via == "ocr" and self.check != "text":
            raise ValueError(f"via: ocr reads text; the check {self.check} takes via: cv, detector or vlm")
        self._equals_has_right_type()
        return self

    def _equals_has_right_type(self) -> None:
        if self.equals is None:
            return
        if self.check == "count":
            if isinstance(self.equals, bool) or not isinstance(self.equals, int) or self.equals < 0:
                raise ValueError(f"equals of a count is a whole number such as 3, not {self.equals!r}")
        elif not isinstance(self.equals, str):
            raise ValueError(
                f"equals of {self.check} is a string, not {self.equals!r}: YAML reads the bare words NO, on, "
                'yes, 12:30 and 007 as booleans and numbers. Put it in quotes: equals: "..."'
            )
        if self.check == "text" and not str(self.equals).strip():
            raise ValueError("equals of text is empty; give the words that the image must show")


class Aggregate(_Model):
    """How requirement scores become one total.

    `weighted_mean` and `geometric` are soft; `all` is 1 if every requirement passes, else 0. A failed `must`
    caps the total at `must_cap`. Unscored requirements are dropped; if those scored have less than the
    fraction `min_scored` of the weight, the total is unscored too.
    """

    method: Literal["weighted_mean", "geometric", "all"] = "weighted_mean"
    must_cap: Fraction = 0.5
    on_unscored: Literal["drop"] = "drop"
    min_scored: Fraction = 0.7


class Gate(_Model):
    """Where `reward` is below `below`, the total reward is at most `cap`. Applied where rewards are combined."""

    reward: str
    below: float
    cap: Fraction


def graph_problems(rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[int, str, str]]:
    """What is wrong between requirements, given as id and needs: the place of one, its field, and how to mend it."""
    ids = [name for name, _ in rows]
    for i, (name, needs) in enumerate(rows):
        if name in ids[:i]:
            yield i, "id", f"two requirements share the id {name}; ids must be unique"
        for need in needs:
            if need not in ids:
                yield i, "needs", f"{name} needs {need}, which no requirement is; {did_you_mean(need, ids)}"
    known = {name: tuple(need for need in needs if need in ids) for name, needs in rows}
    if cycle := _find_cycle(known):
        yield ids.index(cycle[0]), "needs", f"needs go in a circle: {' -> '.join(cycle)}; remove one of them"


def prompt_sha(prompt: str) -> str:
    """Short hash by which a prompt is found again."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


class Source(_Model):
    """Where a rubric comes from.

    `model` and `template` are those of the `llm` decomposer. `uncovered` are the words that no requirement covers.
    `content_sha` is the hash of the rubric as it was made, by which an edit is seen.
    """

    decomposer: str | None = None
    model: str | None = None
    template: str | None = None
    prompt_sha: str | None = None
    edited_by: str | None = None
    uncovered: tuple[str, ...] = ()
    content_sha: str | None = None


def _once(value: object, validate: Callable[[object], Requirement]) -> Requirement:
    """A requirement that is one already was validated when it was made."""
    return value if isinstance(value, Requirement) else validate(value)


class Rubric(_Model):
    """The requirements of one prompt, and how they add up."""

    version: Literal[1] = 1
    prompt: str
    requirements: tuple[Annotated[Requirement, WrapValidator(_once)], ...] = ()
    aggregate: Aggregate = Aggregate()
    gates: tuple[Gate, ...] = ()
    source: Source | None = None

    @model_validator(mode="after")
    def _ids_and_needs(self) -> "Rubric":
        ids: list[str] = []
        for requirement in self.requirements:
            if requirement.id in ids or not all(need in ids for need in requirement.needs):
                break
            ids.append(requirement.id)
        else:
            return self  # each is new and needs only what stands before it, as in most rubrics
        problem = next(graph_problems([(r.id, r.needs) for r in self.requirements]), None)
        if problem is not None:
            raise ValueError(problem[2])
        return self

    @property
    def permits(self) -> frozenset[str]:
        """The artifact classes that the prompt asks for, and that are therefore no defects."""
        return frozenset(p for r in self.requirements for p in r.permits)


@lru_cache(maxsize=1024)
def _wrong_arguments(check: str, *is_given: bool) -> str | None:
    """What is wrong with the arguments of a built-in check, of which some of `_ARGUMENTS` are given."""
    given = {name for name, there in zip(_ARGUMENTS, is_given, strict=True) if there}
    needed = set(NEEDED_FIELDS[check])
    if missing := sorted(needed - given):
        return f"check {check} lacks {', '.join(missing)}; it takes {_fields_of(check)}"
    if surplus := sorted(given - needed - set(OPTIONAL_FIELDS.get(check, ()))):
        return f"check {check} does not take {', '.join(surplus)}; it takes {_fields_of(check)}"
    return None


def _fields_of(check: str) -> str:
    return ", ".join([*NEEDED_FIELDS[check], *(f"{f} (optional)" for f in OPTIONAL_FIELDS.get(check, ()))])


def _require_known_check(check: str) -> None:
    plugins = entry_points(group="rlhf_img.checks").names
    if check not in plugins and not CUSTOM_CHECK.fullmatch(check):
        known = did_you_mean(check, [*BUILTIN_CHECKS, *plugins])
        raise ValueError(f"no check is called {check}; {known}; or a function of yours as path/to/file.py:name")


def _find_cycle(needs: dict[str, tuple[str, ...]]) -> list[str] | None:
    """One cycle of the graph as a path that ends where it starts, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for need in needs[node]:
            if cycle := visit(need, [*path, node]):
                return cycle
        done.add(node)
        return None

    return next((cycle for node in needs if (cycle := visit(node, []))), None)
