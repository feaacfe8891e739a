"""The loop that every training run goes through: restore, measure, iterate, checkpoint, measure again."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.compute import apply_compute
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import save_lora, save_weights
from rlhf_img.model.loading import PLAYGROUND, Model, fast_dtype, load
from rlhf_img.model.policy import POLICY, Policy
from rlhf_img.rewards import Reward, load_rewards
from rlhf_img.training import distributed
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.config import RunConfig
from rlhf_img.training.evaluate import EVAL_SEED, EvalConfig, Evaluation, compare, evaluate, summarise, transfer_ratios
from rlhf_img.training.export import LORA, WEIGHTS
from rlhf_img.training.panel import Best, Panel
from rlhf_img.training.pool.run import PromptPool
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.samples import Drawn, draw_images, draw_together, write_samples
from rlhf_img.training.state import Trained, load_state, save_state
from rlhf_img.training.trackers import NONE, Tracker, check_name
from rlhf_img.training.watch import Draw, Watch, Watched

_PLAYGROUND_PROMPTS = 4096
_NOTED = {
    "panel": "panel/score", "pass": "rubric/pass_all", "accuracy": "pairs/accuracy", "winner": "pairs/winner_rise",
}  # fmt: skip
"""Metrics beside the progress bar, with their words there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What an algorithm brings to the loop."""

    config: RunConfig
    model: Model
    conditioner: Conditioner
    trained: Trained
    """What a checkpoint holds, by name. The one called "policy" is measured and exported."""
    watched: list[Reward]
    """What held-out images are measured by."""
    heldout_prompts: list[Prompt]
    iterate: Callable[[int], dict[str, float]]
    """Trains one iteration, counted from 1, and returns its flat metrics."""
    card: Callable[[RunDir, Drawn, Evaluation, Console], dict[str, Any]] | None = None
    """What else is measured once training is done, given what "after" drew and scored: written to card.json."""
    rewards: tuple[Reward, ...] = ()
    """Those that the policy learns from; what else is in `watched` is held out from it."""
    raw: Draw | None = None
    """What the sentinels hold the policy against; None: the policy's reference, drawn as the policy is."""
    panel: Panel | None = None
    """What tells when the policy was best and when to stop; None: it is trained to the end and kept as it is then."""
    pool: PromptPool | None = None
    """What draws the prompts, if it learns from what is drawn."""
    texts: tuple[str, ...] = ()
    """Prompts that training may draw, as far as they are known when it begins."""
    notes: tuple[str, ...] = ()
    """What a user should read before training begins."""

    @property
    def policy(self) -> Policy:
        """The policy that is measured and exported."""
        return self.trained["policy"][0]

    @property
    def trained_on(self) -> list[str]:
        """Names of the rewards that the policy maximises: a gate, which only caps them, is none."""
        return [reward.name for reward in self.rewards if reward.is_objective]

    @property
    def held_out(self) -> list[str]:
        """Names of the rewards that only measure."""
        return [reward.name for reward in self.watched if reward not in self.rewards]


def open_model(config: RunConfig) -> Model:
    """The run's model in its dtype, in memory if it will be sharded: what is shared out need not fit on a device.

    Raises RlhfImgError if there is none, or no such tracker.
    """
    check_name(config.tracker)
    device = "cpu" if config.shard and distributed.world() > 1 else None
    model = load(config.model, device=device, dtype=run_dtype(config), offload=config.compute.offload)
    apply_compute(model.transformer, config.compute)
    return model


def run_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of the frozen base."""
    return fast_dtype() if config.dtype == "auto" else getattr(torch, config.dtype)


def train(job: Job, run: RunDir, console: Console) -> dict[str, Any]:
    """Trains from the run's last checkpoint, or from the start, to `config.steps`; returns what eval.json holds.

    Raises RunStopped (exit code 3) if the pre-flight check, a reward or a sentinel stops the run, or if a loss or
    gradient is not finite; the last checkpoint stays.
    """
    config = job.config
    first = _restore(job, run)
    for note in job.notes:
        console.print(note, highlight=False, soft_wrap=True)
    _read_ahead(job, console)
    before = _evaluate_before(job, run, console)
    rows = run.read_metrics()
    best, watch = Best(job.panel, run, rows), _watch(job, run, rows)
    run.rotate_checkpoints(config.keep_checkpoints, watch.good() if watch else None)
    tracker_name = config.tracker if distributed.is_first() else NONE
    with _progress(console) as progress, Tracker(tracker_name, run.path) as tracker:
        task = progress.add_task("training", total=config.steps, completed=first, note="")
        for step in range(first + 1, config.steps + 1):
            if best.exhausted:
                break
            metrics = job.iterate(step)
            metrics |= best.look(step, config.steps)
            saved = step % config.checkpoint_every == 0 or step == config.steps or best.exhausted
            if watch is not None and (saved or step % config.sentinels.every == 0):
                metrics |= watch.look(step)
            run.append_metrics(step, metrics)
            tracker.log(metrics, step)
            progress.update(task, completed=step, note=_note(metrics))
            if watch is not None:
                _heed(job, run, watch, step, metrics, progress.console)
            if config.sample_every and step % config.sample_every == 0 and step < config.steps:
                _save_samples(job, run, f"step_{step:06d}")
            if saved:  # last: what a killed run had not written when it is resumed from here would never be written
                write = partial(save_state, trained=job.trained, step=step, pool=job.pool)
                keep = watch.good() if watch else None
                run.save_checkpoint(step, write, keep_last=config.keep_checkpoints, keep=keep)
                if job.pool is not None:
                    job.pool.publish()
    best.restore()
    with job.policy.averaged():
        after, drawn = measured(job, console, "measuring after")
        run.save_samples("after", lambda folder: write_samples(folder, drawn, config.samples))
        _save_trained(job, run)
    result = {
        "split": "heldout", "num_prompts": len(job.heldout_prompts), "images_per_prompt": 1,
        "num_steps": config.eval.num_steps, "guidance": config.eval.guidance,
        "checkpoints": [summarise("before", before), summarise("after", after)],
        "difference": compare(before, after), "transfer": transfer_ratios(before, after, job.trained_on, job.held_out),
        "kept_step": best.step,
    }  # fmt: skip
    run.write_json("eval.json", result)
    if job.card is not None:
        run.write_json("card.json", job.card(run, drawn, after, console))
    return result


def watched_rewards(rewards: list[Reward], config: RunConfig) -> list[Reward]:
    """What held-out images are measured by: the run's rewards, those of `eval.rewards`, and "rubric".

    Raises RlhfImgError if two of them have one name, or if the run would train on one that only measures.
    """
    if measure := next((r.name for r in rewards if r.role == "measure"), None):
        raise RlhfImgError(
            f"reward {measure} only measures: after a policy was trained on it, it could not tell any more whether the "
            f"policy is better or has learnt to please it. Give it as eval.rewards={measure}; to train on it all the "
            f"same, give rewards as a list, with {{reward: {measure}, role: objective}}"
        )
    measuring = load_rewards(config.eval.rewards) if config.eval.rewards else []
    found = [*rewards, *measuring]
    found += [] if any(r.name == "rubric" for r in found) else load_rewards("rubric")
    names = [r.name for r in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RlhfImgError(f'eval.rewards: this run trains on a reward called "{twice}"; give this one another `name`')
    return found


class Clock:
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


def train_and_heldout(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The training and the held-out prompts of a run. Raises RlhfImgError if there are none."""
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
            f'the model "{config.model}" needs prompts: give --prompts FILE ({prompt_room.FORMATS}); '
            "only the playground brings its own"
        )
    return train_prompts, heldout[: config.eval.prompts]


def _restore(job: Job, run: RunDir) -> int:
    latest = run.latest_checkpoint()
    done = load_state(latest.path, job.trained, job.pool) if latest else 0
    if job.pool is not None:
        job.pool.publish()  # of a run that was killed between its checkpoint and this
    run.truncate_metrics(done)
    return done


def _read_ahead(job: Job, console: Console) -> None:
    """Every process reads its share of the prompts into the store, if the run has one."""
    texts = list(dict.fromkeys(["", *job.texts, *(prompt.text for prompt in job.heldout_prompts)]))
    mine = [texts[i] for i in distributed.share(len(texts))]
    with _progress(console) as progress:
        task = progress.add_task("reading prompts", total=len(mine), note="", visible=False)
        for done in job.conditioner.read_ahead(mine):
            progress.update(task, completed=done, visible=True)
    distributed.gather(None)  # none goes on before all is there


def _evaluate_before(job: Job, run: RunDir, console: Console) -> Evaluation:
    """Measures the untrained policy once; a resumed run reads what the first part measured."""
    file = run.path / "eval_before.json"
    if distributed.gather(file.exists())[0]:
        return Evaluation(**json.loads(file.read_text()))
    with job.policy.acting():
        before, drawn = measured(job, console, "measuring before")
    run.save_samples("before", lambda folder: write_samples(folder, drawn, job.config.samples))
    run.write_json(file.name, dataclasses.asdict(before))
    return before


def measured(
    job: Job, console: Console, title: str, *, model: Model | None = None, settings: EvalConfig | None = None
) -> tuple[Evaluation, Drawn]:
    """The held-out evaluation of the active role, with a progress bar; as the run says, if not told otherwise."""
    with _progress(console) as progress:
        task: TaskID = progress.add_task(title, total=None, note="")
        return evaluate(
            model or job.model, job.conditioner, job.watched, job.heldout_prompts, settings or job.config.eval,
            lambda done, total: progress.update(task, completed=done, total=total),
            job.config.samples if job.card is None else None,
        )  # fmt: skip


def _watch(job: Job, run: RunDir, rows: list[dict[str, Any]]) -> Watch | None:
    """The run's sentinels on the first held-out prompts; None if it has none."""
    config, settings = job.config.sentinels, job.config.eval
    if not config.every:
        return None
    num_steps = config.num_steps or min(8, settings.num_steps)

    def draw(acting: Callable[[], AbstractContextManager[Krea2Transformer2DModel]]) -> Draw:
        def images(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
            with acting() as transformer:
                model = dataclasses.replace(job.model, transformer=transformer)
                return draw_images(
                    model, job.conditioner, prompts, seeds, num_steps=num_steps, guidance=settings.guidance
                )

        return images

    watched = Watched(
        config=config, prompts=job.heldout_prompts[: config.prompts], rewards=job.watched,
        trained_on=job.trained_on, held_out=job.held_out, period=job.model.token_pixels,
        draw=draw(job.policy.averaged), draw_raw=job.raw or draw(job.policy.reference),
    )  # fmt: skip
    return Watch(watched, run, rows)


def _heed(job: Job, run: RunDir, watch: Watch, step: int, metrics: dict[str, float], console: Console) -> None:
    """Says what is outside of its band. Raises RunStopped if it is too far; the last good weights are exported then."""
    why = watch.must_stop(metrics)
    if why is None:
        if left := watch.left(metrics):
            said = f"iteration {step}: outside of Raw's band: {'; '.join(left)}"
            console.print(said, highlight=False, soft_wrap=True)
        return
    if good := watch.good():
        load_state(good.path, job.trained)
        with job.policy.averaged():
            if distributed.is_first():
                _save_trained(job, run)
    raise watch.stopped(step, why)


def _save_trained(job: Job, run: RunDir) -> None:
    if job.config.full:
        save_weights(job.model, run.path / WEIGHTS, write=distributed.is_first())
    elif distributed.is_first():
        save_lora(job.model, POLICY, run.path / LORA)


def _save_samples(job: Job, run: RunDir, tag: str) -> None:
    prompts = job.heldout_prompts[: job.config.samples]
    seeds = [EVAL_SEED + i for i in range(len(prompts))]
    with job.policy.averaged():
        drawn = draw_together(
            job.model, job.conditioner, job.watched, prompts, seeds, num_steps=job.config.eval.num_steps,
            guidance=job.config.eval.guidance,
        )  # fmt: skip
    run.save_samples(tag, lambda folder: write_samples(folder, drawn, len(prompts)))


def _note(metrics: Mapping[str, float]) -> str:
    shown = {
        name.removeprefix("reward/").removesuffix("/mean"): value
        for name, value in metrics.items()
        if name.startswith("reward/") and name.endswith("/mean")
    }
    shown |= {word: metrics[key] for word, key in _NOTED.items() if key in metrics}
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items())


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress
