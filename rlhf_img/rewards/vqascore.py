"""VQAScore: the probability that a vision-language model says yes when asked whether the image shows the prompt."""

from collections.abc import Mapping, Sequence

from rlhf_img.config import from_mapping
from rlhf_img.judges import Ask, JudgeConfig, open_judge
from rlhf_img.rewards.protocol import Images, Verdict

PLAYGROUND = "playground"
"""The judge of the playground's images that comes with the package."""


def vqascore(
    prompts: Sequence[str],
    images: Images,
    *,
    judge: Mapping[str, object] | None = None,
    question: str = 'Does this image show "{prompt}"?',
    **columns: object,
) -> list[Verdict]:
    """P(yes) of a vision-language model, asked whether the image shows the whole prompt; in [0, 1].

    Lin et al. 2024, arXiv:2404.01291, with any model that the reward `rubric` can ask as a judge. judge: option, as
    there, such as {model: Qwen/Qwen3-VL-8B-Instruct} or {model: NAME, url: http://localhost:8000/v1}; the default is
    the package's own judge of the playground's images. question: option. A judge's failure is unscored.
    """
    found = open_judge(from_mapping(JudgeConfig, judge or {"model": PLAYGROUND}, "judge"))
    asks = [Ask(image=array, question=question.format(prompt=prompt))
            for prompt, array in zip(prompts, images.arrays, strict=True)]
    return [Verdict(value=answer.p_yes, reason=answer.reason) for answer in found.ask(asks)]


vqascore.range = (0.0, 1.0)  # type: ignore[attr-defined]
vqascore.floor = 0.02  # type: ignore[attr-defined]
vqascore.needs = "a judge: any vision-language model"  # type: ignore[attr-defined]
