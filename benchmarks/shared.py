"""What benchmarks share: timing in turn, the stock forward behind our loops, a table and a JSON file."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_img.config import versions
from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model


def in_turn(paths: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, run in turn, so that what else the machine does hits all alike; warm them up before."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, run in paths.items():
            start = now(device)
            run()
            times[name].append(now(device) - start)
    return {name: statistics.median(found) for name, found in times.items()}


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StockConditioner:
    """Prompts as the stock pipeline encodes them, padded to 512 tokens, for `stock_velocity`: a token's tapped states
    in a row, and whether it is one."""

    def __init__(self, model: Model) -> None:
        self._pipeline: Krea2Pipeline = model.pipeline()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        hidden, mask = self._pipeline.get_text_hidden_states(list(prompts))
        return list(torch.cat([hidden.flatten(2), mask[..., None].to(hidden)], dim=-1))


def stock_velocity(
    transformer: Krea2Transformer2DModel, x: Tensor, sigma: Tensor, text: Tensor, grid: tuple[int, int]
) -> Tensor:
    """The stock forward: it fuses the text, rebuilds the rotary tables and masks the padding at every call."""
    hidden = text[..., :-1].unflatten(-1, (transformer.config.num_text_layers, -1))
    ids = Krea2Pipeline.prepare_position_ids(text.shape[1], *grid, x.device)
    like = transformer.img_in.weight
    with torch.autocast(like.device.type, like.dtype, enabled=like.dtype != torch.float32):
        v = transformer(
            x.to(like.dtype), hidden.to(like.dtype), sigma.reshape(-1).to(x).expand(len(x)), ids,
            encoder_attention_mask=text[..., -1].bool(), return_dict=False,
        )[0]  # fmt: skip
    return v.to(x.dtype)


Forward = Callable[..., Tensor]


@contextmanager
def replaced(make: Callable[[str, Forward], Forward]) -> Iterator[None]:
    """Inside, every module of ours that calls the forward calls `make(name of the module, forward)` in its place."""
    rooms = [m for n, m in sys.modules.items() if n.startswith("rlhf_img.") and vars(m).get("velocity") is velocity]
    for room in rooms:
        vars(room)["velocity"] = make(room.__name__, velocity)
    try:
        yield
    finally:
        for room in rooms:
            vars(room)["velocity"] = velocity


@contextmanager
def stock_forward(transformer: Krea2Transformer2DModel) -> Iterator[None]:
    """Inside, all loops work on the stock forward and attention."""
    transformer.set_attn_processor(Krea2AttnProcessor())
    try:
        with replaced(lambda room, forward: stock_velocity):
            yield
    finally:
        use_lean_blocks(transformer)


def report(title: str, rows: Sequence[Mapping[str, object]], file: Path | None, **facts: object) -> None:
    """A table of `rows`, whose keys are its columns, and the same as JSON with the facts, hardware and versions."""
    known = versions()
    threads = f"{torch.get_num_threads()} thread(s)"
    table = Table(title=title, caption=f"{known['hardware']}, {threads}; torch {torch.__version__}")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if file is not None:
        content = {"title": title, "rows": list(rows), **facts, "threads": torch.get_num_threads(), "versions": known}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
