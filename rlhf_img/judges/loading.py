"""From a config to a judge."""

from functools import lru_cache

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.canary import Canary
from rlhf_img.judges.fake import FakeJudge
from rlhf_img.judges.protocol import Judge, JudgeConfig

FAKE_URL = "fake:"


@lru_cache(maxsize=8)
def open_judge(config: JudgeConfig) -> Judge:
    """The judge of a config; the same one for the same config, so that its account and its canary go on.

    `url: "fake:"` gives one that answers by chance, to try a set-up out. Raises RlhfImgError if the judge cannot be
    opened.
    """
    judge = _open(config)
    return Canary(judge, every=config.canary_every) if config.canary_every else judge


def _open(config: JudgeConfig) -> Judge:
    if config.url == FAKE_URL:
        return FakeJudge(max_failed=config.max_failed)
    if config.url is None:
        from rlhf_img.judges.local import LocalJudge

        return LocalJudge.load(config)
    try:
        from rlhf_img.judges.openai import OpenAIJudge
    except ModuleNotFoundError as error:
        missing = f"a judge server needs {error.name}, which is not installed"
        raise RlhfImgError(f"{missing}: pip install 'rlhf-img[judge]'") from error
    return OpenAIJudge(config)
