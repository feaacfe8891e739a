"""The grammar decomposer: English prompt -> requirements, and every word that it could not turn into one.

No network and no model: phrases of a lexicon, well under a millisecond a prompt.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.found import Parse
from rlhf_img.rubrics.parser import parse_prompt
from rlhf_img.rubrics.reading import Group, Phrases
from rlhf_img.rubrics.schema import Requirement, Rubric, Source, prompt_sha


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """A prompt's rubric, and the words of the prompt that no requirement covers, in their order."""

    rubric: Rubric
    uncovered: tuple[str, ...]


def decompose(prompt: str) -> Decomposition:
    """The requirements of an English prompt.

    "a red circle" asks for a circle, exactly one, and that it is red. Two groups that share a noun are told apart by
    colour or size in their target ("red star", "blue star"). What is not understood is in `uncovered`, never dropped.
    """
    parse = parse_prompt(prompt)
    rubric = Rubric(
        prompt=prompt,
        requirements=tuple(_requirements(parse)),
        source=Source(decomposer="grammar", prompt_sha=prompt_sha(prompt)),
    )
    return Decomposition(rubric=rubric, uncovered=tuple(parse.uncovered))


def _requirements(parse: Parse) -> list[Requirement]:
    groups = _merge_equal(parse)
    handles = _handles(groups)
    ids = _Ids()
    objects: dict[str, str] = {}
    result: list[Requirement] = []
    for place, (group, handle) in enumerate(zip(groups, handles, strict=True)):
        if handle in objects:
            continue
        objects[handle] = ids.new("no", handle) if group.absent else ids.new(handle)
        if group.absent:
            result.append(Requirement(id=objects[handle], check="object", target=handle, expect="absent"))
        else:
            result += _group_requirements(group, handle, place in parse.plural, objects[handle], ids)
    result += _relation_requirements(parse, handles, objects, ids)
    for bearer, text in dict.fromkeys(parse.texts):
        target = handles[bearer] if bearer is not None else None
        on = (objects[target],) if target is not None else ()
        result.append(Requirement(id=ids.new("text", text), check="text", target=target, equals=text, needs=on))
    if parse.background:
        result.append(Requirement(id=ids.new("background"), check="background", equals=parse.background))
    for style, wanted in parse.styles.items():
        result.append(
            Requirement(
                id=ids.new(style), check="style", equals=style, expect="present" if wanted else "absent",
                permits=_permits(style) if wanted else (),
            )
        )  # fmt: skip
    return [*result, *_question_requirements(parse, groups, handles, objects, ids)]


def _group_requirements(group: Group, handle: str, plural: bool, name: str, ids: "_Ids") -> Iterable[Requirement]:
    """That a group is there, its number, and each of its attributes that its handle does not say."""
    needs, said = (name,), f" {handle.removesuffix(group.noun)}"
    yield Requirement(id=name, check="object", target=handle)
    if group.count is not None:
        yield Requirement(
            id=ids.new(handle, "count"), check="count", target=handle, equals=group.count, needs=needs
        )
    for check, value in (("color", group.color), ("size", group.size)):
        if value is not None and f" {value} " not in said:
            yield Requirement(id=ids.new(handle, value), check=check, target=handle, equals=value, needs=needs)
    for trait in group.traits:
        if f" {trait} " not in said:
            ask = _ask(group, handle, plural, trait)
            yield Requirement(
                id=ids.new(handle, trait), check="vqa", target=handle, ask=ask, needs=needs, permits=_permits(trait)
            )


def _ask(group: Group, handle: str, plural: bool, says: str) -> str:
    """A question about a group, such as "Are the red cats sleeping?"."""
    if says in lexicon.MATERIALS:
        says = f"made of {lexicon.MATERIALS[says]}"
    name = handle.removesuffix(group.noun) + (group.name or group.noun)
    return f"{'Are' if plural else 'Is'} the {name} {says}?"


def _permits(words: str) -> tuple[str, ...]:
    """The artifact classes that a style, or words that ask for it, permit: "vintage polaroid photo" as "polaroid"."""
    if words in _PERMITS:
        return _PERMITS[words]
    parts = words.split(" ")
    inside = (_PERMITS[found] for at in range(len(parts)) if (found := _STYLE_PHRASES.at(parts, at)))
    return tuple(dict.fromkeys(artifact for permits in inside for artifact in permits))


_PERMITS = {
    phrase: style.permits
    for table in (lexicon.STYLES, lexicon.MEDIA)
    for name, style in table.items()
    for phrase in (name, *style.phrases)
}
_STYLE_PHRASES = Phrases(_PERMITS)


def _question_requirements(
    parse: Parse, groups: list[Group], handles: list[str], objects: Mapping[str, str], ids: "_Ids"
) -> Iterable[Requirement]:
    for question in dict.fromkeys(parse.questions):
        target, ask = None, question.says
        needs: tuple[str, ...] = ()
        if question.about is not None:
            target = handles[question.about]
            needs = (objects[target],)
            if not ask.endswith("?"):
                ask = _ask(groups[question.about], target, question.about in parse.plural, ask)
        yield Requirement(
            id=ids.new(target or "", question.says), check="vqa", target=target, ask=ask, needs=needs,
            expect="absent" if question.absent else "present",
        )  # fmt: skip


def _relation_requirements(
    parse: Parse, handles: list[str], objects: Mapping[str, str], ids: "_Ids"
) -> Iterable[Requirement]:
    for subject, relation, other in dict.fromkeys(parse.relations):
        a, b = handles[subject], handles[other]
        needs = tuple(dict.fromkeys((objects[a], objects[b])))
        name = ids.new(a, relation, b)
        yield Requirement(id=name, check="relation", subject=a, relation=relation, object=b, needs=needs)


def _merge_equal(parse: Parse) -> list[Group]:
    """Groups that differ in nothing but their count are one: "a cat and a cat" are two cats. Places are kept."""
    totals: dict[tuple[object, ...], int] = {}
    for group in parse.groups:
        if group.count is not None:
            totals[_but_count(group)] = totals.get(_but_count(group), 0) + group.count
    merged = []
    for group in parse.groups:
        total = totals.get(_but_count(group), group.count)
        merged.append(group if total == group.count else replace(group, count=total))
    return merged


def _but_count(group: Group) -> tuple[object, ...]:
    return group.noun, group.color, group.size, group.traits, group.absent


def _handles(groups: list[Group]) -> list[str]:
    """What each group is called as a target: its noun, and before it what tells it from others of that noun."""

    def distinct(names: list[str], of: Collection[Group]) -> bool:
        return len(set(names)) == len(set(of))

    handles = []
    attributes: tuple[str | None, ...]
    of_noun: dict[str, list[Group]] = {}
    for group in dict.fromkeys(g for g in groups if not g.absent):
        of_noun.setdefault(_kind(group), []).append(group)
    for group in groups:
        rivals = of_noun.get(_kind(group), [])
        if group.absent or distinct([_kind(g) for g in rivals], rivals):
            attributes = (group.size, group.color, *group.traits) if group.absent else ()
        elif distinct([f"{g.color}" for g in rivals], rivals):
            attributes = (group.color,)
        elif distinct([f"{g.size} {g.color}" for g in rivals], rivals):
            attributes = (group.size, group.color)
        else:
            attributes = (group.size, group.color, *group.traits)
        handles.append(" ".join([*(a for a in attributes if a), group.noun]))
    return handles


def _kind(group: Group) -> str:
    """The noun, or the shape that the checks take it for: "a red disc and a blue circle" must be told apart."""
    return lexicon.SHAPE_SYNONYMS.get(group.noun, group.noun)


_NO_ID = re.compile(r"[^a-z0-9]+")


class _Ids:
    """Readable ids, each given once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def new(self, *parts: str) -> str:
        name = "_".join(parts).lower().replace(" ", "_")
        if not (name.isidentifier() and name.isascii()) or "__" in name or name[0] == "_" or name[-1] == "_":
            name = _NO_ID.sub("_", name).strip("_") or "requirement"
        chosen, n = name, 2
        while chosen in self._used:
            chosen, n = f"{name}_{n}", n + 1
        self._used.add(chosen)
        return chosen
