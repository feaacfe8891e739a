"""Warnings about a valid rubric that probably does not say what its author meant."""

import re

from rlhf_img.rubrics import lexicon
from rlhf_img.rubrics.schema import Rubric

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
_NEGATION = re.compile(r"\b(no|without|never)\b", re.IGNORECASE)


def lint(rubric: Rubric) -> list[str]:
    """One sentence per warning; empty if there is nothing to say. Errors are found when the rubric is loaded."""
    warnings = []
    if not rubric.requirements:
        warnings.append("there are no requirements: every image would be unscored")
    facts: dict[tuple[object, ...], str] = {}
    for r in rubric.requirements:
        fact = (r.check, r.target, r.equals, r.subject, r.relation, r.object, r.ask)
        if fact in facts:
            warnings.append(f"{r.id} says the same as {facts[fact]}: it counts twice")
        facts.setdefault(fact, r.id)
        if r.ask and " and " in r.ask:
            warnings.append(f"{r.id} asks two things at once; split it, or half an answer is rewarded")
        if r.check == "style" and r.expect == "present" and not r.permits and r.equals in lexicon.STYLES:
            permits = ", ".join(lexicon.STYLES[str(r.equals)].permits)
            warnings.append(
                f"{r.id} asks for {r.equals} without permits: [{permits}]; the artifact reward will punish it"
            )
    quoted = {a or b for a, b in _QUOTED.findall(rubric.prompt)}
    checked = {str(r.equals).casefold() for r in rubric.requirements if r.check == "text"}
    asked = " ".join(r.ask or "" for r in rubric.requirements).casefold()
    unchecked = sorted(q for q in quoted if q.casefold() not in checked and q.casefold() not in asked)
    warnings += [f'the prompt quotes "{q}", which no text requirement checks' for q in unchecked]
    plain = _QUOTED.sub("", rubric.prompt)
    if (word := _NEGATION.search(plain)) and not any(r.expect == "absent" for r in rubric.requirements):
        warnings.append(f'the prompt says "{word[0]}", but no requirement has expect: absent')
    return warnings
