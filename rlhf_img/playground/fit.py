"""A small supervised training loop that resumes exactly: batches depend on the step alone, so nothing but the
modules, the optimiser and the step has to be kept."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

LossFn = Callable[[int], Tensor]
"""Step -> loss (scalar). It draws its batch from a generator seeded by the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How one part of the embedded model is trained."""

    steps: int
    """Optimiser steps."""
    lr: float
    """Peak learning rate of AdamW: a linear warm-up of 100 steps, then a cosine to 2 %."""
    weight_decay: float = 0.01
    ema: float | None = None
    """Decay of the exponential moving average that replaces the weights at the end; None: the last weights."""
    save_every: int = 250
    """Steps between checkpoints and previews."""


def fit(
    name: str,
    module: nn.Module,
    loss_fn: LossFn,
    config: FitConfig,
    folder: Path,
    preview: Callable[[int], None] | None = None,
) -> None:
    """Trains `module` in place and leaves it in eval mode, with the averaged weights if there are any.

    Continues from `folder/{name}.pt` where a killed run left off and ends at once where it is finished.
    `preview(step)` is called with the weights that would be kept if training ended there.
    """
    state_file = folder / f"{name}.pt"
    params = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    start = _restore(state_file, module, optimizer, average)
    with Progress(
        TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(), refresh_per_second=1,
    ) as progress:
        task = progress.add_task(name, total=config.steps, completed=start, loss=math.nan)
        module.train()
        smooth, since = math.nan, time.time()
        for step in range(start, config.steps):
            loss = _update(module, params, optimizer, loss_fn, step, config)
            _average(average, params, config.ema, step)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            progress.update(task, completed=step + 1, loss=smooth)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                rate = config.save_every / (time.time() - since)
                print(f"{name} step {step + 1}/{config.steps} loss {smooth:.5f} {rate:.2f} steps/s", flush=True)
                _save(state_file, module, optimizer, average, step + 1)
                if preview is not None:
                    _with_average(module, params, average, partial(preview, step + 1))
                since = time.time()
    with torch.no_grad():
        for p, a in zip(params, average, strict=True):
            p.copy_(a)
    module.eval()


def _update(
    module: nn.Module, params: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss_fn: LossFn, step: int,
    config: FitConfig,
) -> float:
    warm = min(1.0, (step + 1) / 100)
    scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * scale
    loss = loss_fn(step)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _average(average: list[Tensor], params: list[nn.Parameter], decay: float | None, step: int) -> None:
    # Early on the average follows closely, so that it never holds the random start.
    kept = 0.0 if decay is None else min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, [p.detach() for p in params], 1 - kept)


def _with_average(
    module: nn.Module, params: list[nn.Parameter], average: list[Tensor], call: Callable[[], None]
) -> None:
    last = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, a in zip(params, average, strict=True):
            p.copy_(a)
        module.eval()
        call()
        module.train()
        for p, value in zip(params, last, strict=True):
            p.copy_(value)


def _restore(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor]) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True, map_location="cpu")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for a, value in zip(average, state["average"], strict=True):
        a.copy_(value)
    return int(state["step"])


def _save(
    file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: list[Tensor], step: int
) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, file)
