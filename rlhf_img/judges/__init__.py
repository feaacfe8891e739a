"""Judges: models that look at an image and say how likely a statement about it is true, or that they cannot say.

    >>> from rlhf_img.judges import Ask, JudgeConfig, open_judge
    >>> judge = open_judge(JudgeConfig(url="http://localhost:8000/v1", model="Qwen/Qwen3-VL-8B-Instruct"))
    >>> judge.ask([Ask(image=image, question="Is there a cat in the image?")])[0].p_yes
    0.97

Nothing here imports torch or an HTTP client before a judge that needs it is opened.
"""

from rlhf_img.judges.canary import Canary
from rlhf_img.judges.fake import FakeJudge
from rlhf_img.judges.loading import COUNTS, accounted, load_canaries, only_model, open_judge, save_canaries
from rlhf_img.judges.protocol import Answer, Ask, Drift, Judge, JudgeConfig, Message, Reply, Usage

__all__ = [
    "COUNTS",
    "Answer",
    "Ask",
    "Canary",
    "Drift",
    "FakeJudge",
    "Judge",
    "JudgeConfig",
    "Message",
    "Reply",
    "Usage",
    "accounted",
    "load_canaries",
    "only_model",
    "open_judge",
    "save_canaries",
]
