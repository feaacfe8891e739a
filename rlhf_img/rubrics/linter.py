"""What is wrong or doubtful in a rubric file, where it stands, and how to mend it."""

import re
from collections.abc import Iterator

import yaml

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.files import Finding, finding, read_rubrics
from rlhf_img.rubrics.schema import Requirement, Rubric

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_NEGATION = re.compile(r"\b(no|not|without|never|none)\b|n[’']t\b", re.IGNORECASE)
_COMPOUND = re.compile(r"(?<!-)\b(and|or|as well as|but)\b(?!-)|&", re.IGNORECASE)
_TASTE = re.compile(
    r"\b(beautiful|pretty|nice|good|great|amazing|awesome|stunning|gorgeous|lovely|interesting|aesthetic|appealing|"
    r"pleasing|atmospheric|evocative|masterpiece|professional|perfect|(?:high|best|good)[- ]quality|realistic enough|"
    r"feels?|mood|vibe)\b",
    re.IGNORECASE,
)
_ATTRIBUTES = ("count", "color", "size", "relation", "text")


def lint(text: str) -> list[Finding]:
    """Errors and warnings of the text of a rubric file, in the order of their places; empty if all is well."""
    rubrics, problems = read_rubrics(text)
    for rubric, node in rubrics:
        problems += _of_prompt(rubric, node)
        problems += _of_facts(rubric, node)
        for i, requirement in enumerate(rubric.requirements):
            problems += _of_wording(requirement, node, i)
    return sorted(problems)


def _of_prompt(rubric: Rubric, node: yaml.Node) -> Iterator[Finding]:
    """What the prompt says and no requirement checks."""
    if not rubric.requirements:
        message = "there are no requirements, so that every image is unscored: rubric new PROMPT proposes some"
        yield finding(node, ("requirements",), "warning", message)
    checked = {str(r.equals).casefold() for r in rubric.requirements if r.check == "text"}
    asked = " ".join(r.ask or "" for r in rubric.requirements).casefold()
    for quoted in dict.fromkeys(a or b for a, b in _QUOTED.findall(rubric.prompt)):
        if quoted.casefold() not in checked and quoted.casefold() not in asked:
            message = f'no requirement checks the quoted "{quoted}": add {{check: text, equals: "{quoted}"}}'
            yield finding(node, ("prompt",), "warning", message)
    negation = _NEGATION.search(_QUOTED.sub("", rubric.prompt))
    if negation and not any(r.expect == "absent" for r in rubric.requirements):
        message = f'the prompt says "{negation[0]}": ask for the thing, with expect: absent'
        yield finding(node, ("prompt",), "warning", message)


def _of_facts(rubric: Rubric, node: yaml.Node) -> Iterator[Finding]:
    """The same fact twice, and attributes of a thing that do not need the thing."""
    facts: dict[tuple[object, ...], str] = {}
    things = {r.target: r.id for r in rubric.requirements if r.check == "object" and r.expect == "present"}
    for i, r in enumerate(rubric.requirements):
        fact = (r.check, r.target, r.equals, r.subject, r.relation, r.object, r.ask)
        if fact in facts:
            message = f"{r.id} says the same as {facts[fact]} and counts twice: remove one, or raise its weight"
            yield finding(node, ("requirements", i), "warning", message)
        facts.setdefault(fact, r.id)
        of = (things[t] for t in (r.target, r.subject, r.object) if t in things)
        if r.check in _ATTRIBUTES and (missing := [t for t in dict.fromkeys(of) if t not in r.needs]):
            message = f"{r.id} means nothing without {', '.join(missing)}: add needs: [{', '.join(missing)}]"
            yield finding(node, ("requirements", i), "warning", message)


def _of_wording(r: Requirement, node: yaml.Node, i: int) -> Iterator[Finding]:
    """Requirements that ask several things, for a matter of taste, or for what should not be there."""
    if r.via == "detector" and r.check not in ("object", "count", "relation"):
        message = f"a detector cannot tell {r.check}, so that this is never scored: leave via out, or say via: vlm"
        yield finding(node, ("requirements", i, "via"), "warning", message)
    if r.check == "style" and r.expect == "present" and not r.permits and r.equals in lexicon.STYLES:
        permits = ", ".join(lexicon.STYLES[str(r.equals)].permits)
        message = f"the artifact reward will punish {r.equals}: add permits: [{permits}]"
        yield finding(node, ("requirements", i), "warning", message)
    for name, value in (("ask", r.ask), ("target", r.target), ("subject", r.subject), ("object", r.object)):
        if value is None:
            continue
        words = _QUOTED.sub("", value)
        for pattern, message in (
            (_COMPOUND, '"{}" joins two requirements: split them, or half of it is rewarded like all of it'),
            (_TASTE, '"{}" is a matter of taste: ask for something that two people would see alike'),
            (_NEGATION, '"{}" negates: ask for the thing itself, with expect: absent'),
        ):
            if match := pattern.search(words):
                yield finding(node, ("requirements", i, name), "warning", message.format(match[0]))
