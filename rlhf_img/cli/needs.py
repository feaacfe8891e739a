"""What a step of a run would need, for `rlhf-img doctor --algorithm`."""

from importlib import import_module
from typing import Any

from rlhf_img.config import from_mapping, merge, parse_overrides
from rlhf_img.errors import RlhfImgError, did_you_mean

ALGORITHMS = ("grpo", "nft", "dpo", "tdm", "sft")
_GIB = 2**30
_WITHOUT_DATA = {"dpo": {"pairs": "none"}, "sft": {"data": "none"}}
"""Settings that a run must have and an estimate does not read."""


def needs(
    algorithm: str, model: str, settings: list[str], size: int | None, text: int, memory: float | None,
    rate: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Memory by part and phase in GiB, whether it fits and what would, and seconds by phase.

    `memory` (GiB) and `rate` (TFLOP a second) are those of another device. Raises RlhfImgError for an unknown algorithm
    or setting, or a model whose configs cannot be read.
    """
    if algorithm not in ALGORITHMS:
        raise RlhfImgError(f'there is no estimate for "{algorithm}"; {did_you_mean(algorithm, ALGORITHMS)}')
    import torch

    from rlhf_img.model.loading import default_device
    from rlhf_img.model.sizes import sizes_of
    from rlhf_img.training.estimate import changes, estimate, memory_of, what_fits
    from rlhf_img.training.loop import run_dtype
    from rlhf_img.training.stopwatch import matmul_rate, step_seconds

    room = import_module(f"rlhf_img.training.{algorithm}")
    given = merge(_WITHOUT_DATA.get(algorithm, {}), {"model": model})
    config = from_mapping(room.Config, merge(given, parse_overrides(settings)), "settings")
    device = default_device()
    elsewhere = memory is not None and config.dtype == "auto"
    dtype = torch.bfloat16 if elsewhere else run_dtype(config)
    limit = memory * _GIB if memory is not None else memory_of(device)
    gpu = memory is not None or device.type == "cuda"
    sizes = sizes_of(config.model)
    found = estimate(config, sizes, dtype=dtype, size=size, text=text, gpu=gpu)
    result: dict[str, Any] = {
        "device": f"{memory:g} GiB" if memory is not None else f"{device.type}, {limit / _GIB:.3g} GiB",
        "dtype": str(dtype).removeprefix("torch."), "size_px": size or sizes.default_size,
        "standing_gib": {name: value / _GIB for name, value in found.standing.items()},
        "beside_it_gib": {name: value / _GIB for name, value in found.phases.items()},
        "peak_gib": found.peak / _GIB, "fits": found.peak <= limit,
        "tflop": {name: value / 1e12 for name, value in found.flop.items()},
    }  # fmt: skip
    if not result["fits"]:
        smaller = what_fits(config, sizes, limit, dtype=dtype, size=size, text=text, gpu=gpu)
        result["would_fit"] = "nothing"
        if smaller:
            result["would_fit"] = f"{' '.join(changes(config, smaller[0]))}: {smaller[1].peak / _GIB:.3g} GiB"
    if rate is not None:
        result["seconds"] = {name: value / (rate * 1e12) for name, value in found.flop.items()}
    elif memory is None and result["fits"]:
        result["matmul_tflop_a_second"] = matmul_rate(device, dtype) / 1e12
        result["seconds"] = step_seconds(config, sizes, device=device, dtype=dtype, size=size, text=text)
    if "seconds" in result:
        result["seconds_in_all"] = sum(result["seconds"].values())
    return result
