"""How far an image shows what a LoRA of the playground is for: a style, a colour bias or a new shape."""

from collections.abc import Sequence

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.playground.variants import VARIANTS
from rlhf_img.rewards.protocol import Images, Verdict


def variant(prompts: Sequence[str], images: Images, *, of: str = "striped", **columns: object) -> list[Verdict]:
    """The measure of `VARIANTS[of]` on each image, in [0, 1]; it only measures, and knows the playground alone.

    Raises RlhfImgError for another name, and for images of another size than the playground's.
    """
    if of not in VARIANTS:
        raise RlhfImgError(f'reward variant: there is no variant "{of}"; {did_you_mean(of, VARIANTS)}')
    height, width = images.tensor.shape[-2:]
    if (height, width) != (64, 64):
        raise RlhfImgError(f"reward variant: images are {width} x {height} px, but it knows the playground's 64 x 64")
    return [Verdict(value=VARIANTS[of].score(image)) for image in images.arrays]


variant.range = (0.0, 1.0)  # type: ignore[attr-defined]
variant.role = "measure"  # type: ignore[attr-defined]
