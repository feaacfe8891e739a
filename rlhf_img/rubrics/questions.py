"""Requirements as yes/no questions, and a judge's answers to them as check results."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from rlhf_img.judges import Ask, Judge
from rlhf_img.rubrics.checks import CheckResult, as_expected
from rlhf_img.rubrics.schema import Requirement
from rlhf_img.rubrics.words import english


def question_of(requirement: Requirement) -> str | None:
    """The question whose yes means that the thing is there, also with `expect: absent`: judges mistake negations.

    None for a check of one's own, whose meaning is not known here.
    """
    r = requirement
    match r.check:
        case "object":
            return f"Is there {english().a(str(r.target))} in the image?"
        case "count" if r.equals == 1:
            return f"Is there exactly one {r.target} in the image?"
        case "count":
            number = english().number_to_words(str(r.equals))
            return f"Are there exactly {number} {english().plural(str(r.target))} in the image?"
        case "color" | "size":
            return f"Is the {r.target} {r.equals}?"
        case "relation":
            return f"Is the {r.subject} {r.relation} the {r.object}?"
        case "background":
            return f"Is the background {r.equals}?"
        case "style":
            return f"Does the image show {r.equals}?"
        case "text" if r.extra_text == "ignore":
            return f'Does {_bearer(r)} show the text "{r.equals}"?'
        case "text":
            return f'Does {_bearer(r)} show exactly the text "{r.equals}" and no other text?'
        case "vqa":
            return r.ask
    return None


def _bearer(requirement: Requirement) -> str:
    return f"the {requirement.target}" if requirement.target else "the image"


def ask_judge(
    judge: Judge, images: Sequence[npt.NDArray[Any]], questions: Sequence[tuple[int, Requirement]]
) -> list[CheckResult]:
    """A result for each requirement of an image, given by its place in `images`, uint8 (H, W, 3), RGB.

    P(yes) is the score, its complement with `expect: absent` (VQAScore, Lin et al. 2024, of one requirement at a
    time). A judge that fails leaves it unscored; the evidence says why.
    """
    texts = [question_of(requirement) for _, requirement in questions]
    asks = [Ask(image=images[at], question=q) for (at, _), q in zip(questions, texts, strict=True) if q is not None]
    answers = iter(judge.ask(asks) if asks else [])
    results = []
    for (_, requirement), question in zip(questions, texts, strict=True):
        if question is None:
            results.append(CheckResult(score=None, evidence=f"no question is known for the check {requirement.check}"))
            continue
        answer = next(answers)
        if answer.p_yes is None:
            results.append(CheckResult(score=None, evidence=f"{judge.id} did not answer {question!r}: {answer.reason}"))
            continue
        score = as_expected(answer.p_yes, requirement)
        results.append(CheckResult(score=score, evidence=f"{judge.id}: P(yes) {answer.p_yes:.2f} to {question!r}"))
    return results
