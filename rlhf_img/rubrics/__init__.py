"""Rubrics: what a prompt asks for as verifiable requirements, decomposed, checked by classical vision, and scored.

    >>> from rlhf_img import rubrics
    >>> rubrics.decompose("two red circles on grey").rubric.requirements[0].id
    'circle'

Nothing here imports torch; what is named below is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_img.rubrics.checks import Check, CheckResult, find_check
    from rlhf_img.rubrics.decomposers import decompose_all
    from rlhf_img.rubrics.detector import Detection, Detector, DetectorConfig, open_detector
    from rlhf_img.rubrics.files import Finding, dump_rubrics, load_rubrics, parse_rubrics
    from rlhf_img.rubrics.grammar import Decomposition, decompose
    from rlhf_img.rubrics.linter import lint
    from rlhf_img.rubrics.schema import (
        Aggregate,
        Gate,
        Requirement,
        Rubric,
        Source,
    )
    from rlhf_img.rubrics.scoring import RequirementResult, RubricResult, score, score_all
    from rlhf_img.rubrics.vision import Analysis, Thing, analyze

_HOME = {
    "Check": "checks",
    "CheckResult": "checks",
    "find_check": "checks",
    "Decomposition": "grammar",
    "decompose": "grammar",
    "decompose_all": "decomposers",
    "Detection": "detector",
    "Detector": "detector",
    "DetectorConfig": "detector",
    "open_detector": "detector",
    "lint": "linter",
    "Aggregate": "schema",
    "Gate": "schema",
    "Requirement": "schema",
    "Rubric": "schema",
    "Source": "schema",
    "Finding": "files",
    "dump_rubrics": "files",
    "load_rubrics": "files",
    "parse_rubrics": "files",
    "RequirementResult": "scoring",
    "RubricResult": "scoring",
    "score": "scoring",
    "score_all": "scoring",
    "Analysis": "vision",
    "Thing": "vision",
    "analyze": "vision",
}
__all__ = [
    "Aggregate",
    "Analysis",
    "Check",
    "CheckResult",
    "Decomposition",
    "Detection",
    "Detector",
    "DetectorConfig",
    "Finding",
    "Gate",
    "Requirement",
    "RequirementResult",
    "Rubric",
    "RubricResult",
    "Source",
    "Thing",
    "analyze",
    "decompose",
    "decompose_all",
    "dump_rubrics",
    "find_check",
    "lint",
    "load_rubrics",
    "open_detector",
    "parse_rubrics",
    "score",
    "score_all",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
