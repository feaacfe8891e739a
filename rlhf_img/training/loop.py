"""One run of GRPO, from a config to a report: what `rlhf-img grpo` does."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf_img.algorithms import grpo
from rlhf_img.algorithms.rollout import rollout
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import accounted
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import save_lora
from rlhf_img.model.loading import PLAYGROUND, Model, fast_dtype, load
from rlhf_img.model.policy import POLICY, Policy, make_policy
from rlhf_img.model.vae import decode
from rlhf_img.rewards import Images, Reward, advantages, load_rewards, score
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.config import RunConfig
from rlhf_img.training.evaluate import EVAL_SEED, Evaluation, compare, evaluate, summarise
from rlhf_img.training.preflight import check_ratios
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.samples import draw, write_samples
from rlhf_img.training.sentinels import diversity, image_statistics
from rlhf_img.training.state import load_state, save_state
from rlhf_img.training.trackers import Tracker, check_name

_PLAYGROUND_PROMPTS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything a run works with."""

    config: RunConfig
    model: Model
    policy: Policy
    conditioner: Conditioner
    optimizer: torch.optim.Optimizer
    rewards: list[Reward]
    watched: list[Reward]
    """The run's rewards, "rubric", and those of `eval.rewards`: what held-out images are measured by."""
    train_prompts: list[Prompt]
    heldout_prompts: list[Prompt]


def prepare(config: RunConfig) -> Parts:
    """Loads and builds the parts of a run. Raises RlhfImgError for whatever the user can mend, before any work."""
    check_name(config.tracker)
    rewards = load_rewards(config.rewards)
    watched = _watched(rewards, config)
    train_prompts, heldout_prompts = _prompts(config)
    model = load(config.model, dtype=fast_dtype() if config.dtype == "auto" else getattr(torch, config.dtype))
    policy = make_policy(model.transformer, None if config.full else config.lora, config.seed)
    optimizer = torch.optim.AdamW(
        list(policy.parameters.values()), lr=config.grpo.lr, weight_decay=config.grpo.weight_decay
    )
    return Parts(
        config=config, model=model, policy=policy, conditioner=Conditioner(model), optimizer=optimizer,
        rewards=rewards, watched=watched, train_prompts=train_prompts, heldout_prompts=heldout_prompts,
    )  # fmt: skip


def train(parts: Parts, run: RunDir, console: Console) -> dict[str, Any]:
    """Trains from the run's last checkpoint, or from the start, to `config.steps`; returns what eval.json holds.

    Raises RunStopped (exit code 3) if the pre-flight check or a reward stops the run, or if a loss or gradient is not
    finite; the last checkpoint stays.
    """
    config = parts.config
    first = _restore(parts, run)
    before = _evaluate_before(parts, run, console)
    with _progress(console) as progress, Tracker(config.tracker, run.path) as tracker:
        task = progress.add_task("training", total=config.steps, completed=first, note="")
        for step in range(first + 1, config.steps + 1):
            metrics = iteration(parts, step)
            run.append_metrics(step, metrics)
            tracker.log(metrics, step)
            progress.update(task, completed=step, note=_note(metrics))
            if step % config.checkpoint_every == 0 or step == config.steps:
                run.save_checkpoint(step, partial(_save, parts, step))
            if config.sample_every and step % config.sample_every == 0 and step < config.steps:
                _save_samples(parts, run, f"step_{step:06d}")
    with parts.policy.averaged():
        after, drawn = _evaluate(parts, console, "measuring after")
        run.save_samples("after", lambda folder: write_samples(folder, drawn, config.samples))
        if not config.full:
            save_lora(parts.model, POLICY, run.path / "lora")
    result = {
        "split": "heldout", "num_prompts": len(parts.heldout_prompts), "images_per_prompt": 1,
        "num_steps": config.eval.num_steps, "guidance": config.eval.guidance,
        "checkpoints": [summarise("before", before), summarise("after", after)],
        "difference": compare(before, after),
    }  # fmt: skip
    run.write_json("eval.json", result)
    return result


def iteration(parts: Parts, step: int) -> dict[str, float]:
    """One iteration of GRPO: draw prompts, sample groups, score them, update the policy. Returns flat metrics."""
    config = parts.config
    clock = _Clock()
    drawn = prompt_room.draw(parts.train_prompts, config.grpo.prompts, step - 1, config.seed)
    texts = [p.text for p in drawn]
    sampled = rollout(
        parts.model, parts.policy, parts.conditioner, texts, config.grpo, _rollout_seed(config, step)
    )
    deviation = check_ratios(parts.policy, sampled, config.grpo) if step == 1 else math.nan
    size = parts.model.default_size
    images = Images(decode(parts.model, sampled.latents(), size, size).detach().cpu())
    clock.lap("rollout")

    repeated = [p for p in drawn for _ in range(config.grpo.group)]
    with accounted() as judged:
        scores = score(
            parts.rewards, [p.text for p in repeated], images, {"rubrics": [p.rubric for p in repeated]},
            group_size=config.grpo.group, max_unscored=config.max_unscored,
        )  # fmt: skip
    values_PGK = scores.values_BK.unflatten(0, (len(drawn), config.grpo.group))
    gates = [(p.rubric or rubric_of(p.text)).gates for p in drawn]
    advantages_PG, metrics = advantages(parts.rewards, values_PGK, method=config.combine, prompt_gates=gates)
    clock.lap("reward")

    lr = config.grpo.lr * (1 - (step - 1) / config.steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    try:
        trained = grpo.update(
            parts.policy, parts.optimizer, sampled, advantages_PG.flatten().to(parts.model.device), config.grpo
        )
    except FloatingPointError as error:
        raise RunStopped(
            f"iteration {step}: {error}. The last checkpoint stays; go on from it with --resume and a lower grpo.lr, "
            "or look at the rewards of this iteration in metrics.jsonl"
        ) from error
    clock.lap("train")
    seen = {f"sentinel/{name}": value for name, value in image_statistics(images.tensor).items()}
    seen["sentinel/diversity"] = float(diversity(images.tensor.unflatten(0, (len(drawn), -1))).mean())
    first = {} if math.isnan(deviation) else {"preflight/max_dev": deviation}
    learned = {**trained, **_renamed(metrics), **_rubric_metrics(scores.details), **judged}
    return {**learned, **seen, **first, **clock.times(), "lr": lr}


def _watched(rewards: list[Reward], config: RunConfig) -> list[Reward]:
    measuring = load_rewards(config.eval.rewards) if config.eval.rewards else []
    found = [*rewards, *measuring]
    found += [] if any(r.name == "rubric" for r in found) else load_rewards("rubric")
    names = [r.name for r in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RlhfImgError(f'eval.rewards: this run trains on a reward called "{twice}"; give this one another `name`')
    return found


def _rollout_seed(config: RunConfig, step: int) -> int:
    """Distinct for every run seed, iteration and image (an iteration uses the numbers that follow)."""
    return (config.seed * 100_003 + step) * 100_000


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    names = {"tie_rate": "ties", "advantage_std": "advantage/std"}
    return {names.get(name, name): value for name, value in metrics.items()}


def _rubric_metrics(details: Mapping[str, tuple[object, ...]]) -> dict[str, float]:
    results = [r for r in details.get("rubric", ()) if r is not None]
    passed = [r.passed for r in results if r.passed is not None]  # type: ignore[attr-defined]
    single = [q.passed for r in results for q in r.requirements if q.passed is not None]  # type: ignore[attr-defined]
    if not passed:
        return {}
    return {"rubric/pass_all": sum(passed) / len(passed), "rubric/pass_requirement": sum(single) / len(single)}


class _Clock:
    """Wall-clock seconds of the parts of an iteration."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        return {**self._laps, "time/step": time.perf_counter() - self._start}


def _prompts(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    heldout = prompt_room.read_prompts(Path(config.eval_prompts)) if config.eval_prompts else None
    if config.prompts is not None:
        train_prompts = prompt_room.read_prompts(Path(config.prompts))
        if heldout is None:
            train_prompts, heldout = prompt_room.split_heldout(train_prompts, config.eval.heldout_share, config.seed)
    elif config.model == PLAYGROUND:
        train_prompts = prompt_room.from_playground("train", _PLAYGROUND_PROMPTS)
        heldout = heldout or prompt_room.from_playground("heldout", config.eval.prompts)
    else:
        raise RlhfImgError(
            f'the model "{config.model}" needs prompts: give --prompts FILE (.txt, .jsonl or .yaml); '
            "only the playground brings its own"
        )
    return train_prompts, heldout[: config.eval.prompts]


def _restore(parts: Parts, run: RunDir) -> int:
    latest = run.latest_checkpoint()
    done = load_state(latest.path, parts.policy, parts.optimizer) if latest else 0
    run.truncate_metrics(done)
    return done


def _save(parts: Parts, step: int, folder: Path) -> None:
    save_state(folder, parts.policy, parts.optimizer, step)


def _evaluate_before(parts: Parts, run: RunDir, console: Console) -> Evaluation:
    """Measures the untrained policy once; a resumed run reads what the first part measured."""
    file = run.path / "eval_before.json"
    if file.exists():
        return Evaluation(**json.loads(file.read_text()))
    with parts.policy.acting():
        before, drawn = _evaluate(parts, console, "measuring before")
    run.save_samples("before", lambda folder: write_samples(folder, drawn, parts.config.samples))
    run.write_json(file.name, dataclasses.asdict(before))
    return before


def _evaluate(parts: Parts, console: Console, title: str) -> Any:
    with _progress(console) as progress:
        task: TaskID = progress.add_task(title, total=None, note="")
        return evaluate(
            parts.model, parts.conditioner, parts.watched, parts.heldout_prompts, parts.config.eval,
            lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip


def _save_samples(parts: Parts, run: RunDir, tag: str) -> None:
    prompts = parts.heldout_prompts[: parts.config.samples]
    seeds = [EVAL_SEED + i for i in range(len(prompts))]
    with parts.policy.averaged():
        drawn = draw(
            parts.model, parts.conditioner, parts.watched, prompts, seeds, num_steps=parts.config.eval.num_steps,
            guidance=parts.config.eval.guidance,
        )  # fmt: skip
    run.save_samples(tag, lambda folder: write_samples(folder, drawn, len(prompts)))


def _note(metrics: Mapping[str, float]) -> str:
    shown = {
        name.removeprefix("reward/").removesuffix("/mean"): value
        for name, value in metrics.items()
        if name.startswith("reward/") and name.endswith("/mean")
    }
    if "rubric/pass_all" in metrics:
        shown["pass"] = metrics["rubric/pass_all"]
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items())


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress
