"""How often the playground's judge agrees with the exact checks on held-out scenes, and the card that says so."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from safetensors import safe_open

from rlhf_img.config import versions
from rlhf_img.judges import Ask, JudgeConfig
from rlhf_img.judges.local import LocalJudge
from rlhf_img.rubrics.questions import question_of
from rlhf_img.training.judge import JudgeTraining, asked_drawn
from rlhf_img.training.judge_data import KINDS, Asked, asked_damaged, asked_render

_TEMPLATE = """# The playground's judge

A Qwen3-VL in small that answers yes/no questions about the playground's images, remade by `rlhf-img playground
train-judge`. Stock transformers loads this folder; a judge config or `--judge-model` takes its path.

It knows the playground's words and nothing else: of real photographs it says nothing that means anything.

**Data.** Rendered scenes of the training split with questions in the words of `rlhf_img.rubrics.questions`, answered by
the scene; damaged renders and images that the embedded model drew, answered by the exact checks. About half yes.

**Size.** {parameters:,} parameters, bfloat16.

**Recipe.**

```yaml
{recipe}```

**Agreement** with the exact checks, in which yes and no weigh the same, where yes is right, and where no is right:

| images | kind of check | agreement | where yes | where no | questions (yes + no) |
|---|---|---|---|---|---|
{rows}

The images are new; the renders and the damaged ones show combinations of colour, shape and background that training
never does. Questions whose score is within 0.08 of the border are left out of the renders.

Hardware of this measurement: {hardware}; torch {torch}, transformers {transformers}.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Questions of one kind about one kind of image, and on how many the judge agrees with the exact checks."""

    images: str
    kind: str
    right_yes: int
    yes: int
    right_no: int
    no: int

    @property
    def balanced(self) -> float:
        """Mean of the agreements where yes and where no is right; NaN if one of them was never asked."""
        return (self.right_yes / self.yes + self.right_no / self.no) / 2 if self.yes and self.no else math.nan


def measure_judge(folder: Path, count: int = 500, drawn: int = 200, seed: int = 1) -> list[Agreement]:
    """Agreement on `count` held-out renders, half as many damaged ones, and `drawn` images of the embedded model.

    Four questions an image, asked as any judge is. A question without an answer counts as no agreement.
    """
    rng = np.random.default_rng((90_000_000, seed))
    sources = {
        "renders": [asked_render(rng, "heldout", 4) for _ in range(count)],
        "damaged": [asked_damaged(rng, "heldout", 4) for _ in range(count // 2)],
        "drawn": asked_drawn(drawn, "heldout", 4, seed),
    }
    return [row for name, items in sources.items() if items for row in _agreements(folder, name, items)]


def _agreements(folder: Path, images: str, items: Sequence[Asked]) -> list[Agreement]:
    """The row of every kind together, and one for each."""
    judge = LocalJudge.load(JudgeConfig(model=str(folder), max_failed=1.0))
    asked = [(item.image, requirement, truth) for item in items for requirement, truth in item.questions]
    answers = judge.ask([Ask(image=image, question=str(question_of(r))) for image, r, _ in asked])
    counts = {kind: np.zeros(4, np.int64) for kind in ("all", *KINDS)}  # right yes, yes, right no, no
    for (_, requirement, truth), answer in zip(asked, answers, strict=True):
        right = answer.p_yes is not None and (answer.p_yes >= 0.5) == truth
        for kind in ("all", requirement.check):
            counts[kind][0 if truth else 2] += right
            counts[kind][1 if truth else 3] += 1
    return [
        Agreement(images=images, kind=kind, right_yes=int(a), yes=int(b), right_no=int(c), no=int(d))
        for kind, (a, b, c, d) in counts.items()
    ]


def write_judge_card(folder: Path, config: JudgeTraining, rows: Sequence[Agreement]) -> None:
    """README.md beside the weights."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    known = versions()
    lines = (
        f"| {r.images} | {r.kind} | {_percent(r.balanced)} | {_share(r.right_yes, r.yes)} | {_share(r.right_no, r.no)} "
        f"| {r.yes} + {r.no} |"
        for r in rows
    )
    text = _TEMPLATE.format(
        parameters=parameters, recipe=yaml.safe_dump(asdict(config), sort_keys=False), rows="\n".join(lines),
        hardware=known["hardware"], torch=known["torch"], transformers=known["transformers"],
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def _share(right: int, asked: int) -> str:
    return _percent(right / asked if asked else math.nan)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
