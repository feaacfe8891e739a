"""`rlhf-img doctor`: what this machine can do, what a run would need, and how good and how fast a judge is."""

import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_img.cli import judge as options
from rlhf_img.cli.facts import print_facts
from rlhf_img.cli.needs import ALGORITHMS, needs
from rlhf_img.config import versions
from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from rlhf_img.judges import Ask, Judge

EXTRAS = {"ocr": ("rapidocr", "onnxruntime"), "judge": ("httpx", "tenacity"), "annotate": ("starlette", "uvicorn"),
          "pool": ("datasketch", "sklearn"), "postgres": ("psycopg",),
          "remote": ("httpx", "starlette", "tenacity", "uvicorn"), "vlm": ("datasets", "trl")}
REPEATED, REPEATS = 8, 5
"""How many questions are asked how often to see the judge's noise."""
VOTES = 8
"""Samples for P(yes) from a server that gives no token probabilities."""


def doctor(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings of the run, with --algorithm.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(metavar="A", help=f"Predict memory and time of a step: {', '.join(ALGORITHMS)}.")
    ] = None,
    model: Annotated[
        str, typer.Option(help='Of the run: as for training, or "krea-2", the published sizes without files.')
    ] = "playground",
    size: Annotated[int | None, typer.Option(help="Side of an image in pixels [default: the model's].")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt, with five for the template.")] = 64,
    memory: Annotated[
        float | None, typer.Option(help="GiB of the device that is planned for, in bfloat16 [default: this one's].")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="TFLOP a second that it reaches [default: blocks are timed here].")
    ] = None,
    judge_url: options.Url = None,
    judge_model: options.Model = None,
    judge_key_env: options.KeyEnv = None,
    images: Annotated[int, typer.Option(help="How many rendered images the judge is asked about.", min=1)] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can do; with --algorithm, what a step of a run would need, before anything is loaded; and
    with a judge, measure it: speed, noise, and agreement with the exact checks.

    Examples:

        rlhf-img doctor --algorithm grpo

        rlhf-img doctor --algorithm tdm --model krea-2 --memory 80 --rate 600 tdm.batch_size=4

        rlhf-img doctor --judge-url http://localhost:8000/v1
    """
    found = {"machine": _machine()}
    if algorithm is not None:
        found[f"a step of {algorithm}"] = needs(algorithm, model, settings or [], size, text_tokens, memory, rate)
    elif settings:
        known = ", ".join(ALGORITHMS)
        raise RlhfImgError(f"{settings[0]}: settings are of a run, so say of which: --algorithm, one of {known}")
    judged = options.model_of(judge_model, judge_url, judge_key_env)
    if judged is not None:
        found["judge"] = _judge(judged, judge_url, judge_key_env, images)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        print_facts(title, rows)


def _machine() -> dict[str, Any]:
    known = versions()
    gpus = known["hardware"].split(", ")[1:]
    result = {
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpu": ", ".join(gpus) or "none",
    }
    if gpus:
        import torch

        result["torch_sees_the_gpu"] = torch.cuda.is_available()
    extras = {name: all(importlib.util.find_spec(m) for m in modules) for name, modules in EXTRAS.items()}
    return result | {"extras": extras, "versions": known}


def _judge(model: str, url: str | None, key_env: str | None, images: int) -> dict[str, Any]:
    import numpy as np

    questions = _questions(images)
    asks = [ask for ask, _ in questions]
    judge = _opened(model, url, key_env, asks[0])
    began = time.perf_counter()
    answers = judge.ask(asks)
    wall = time.perf_counter() - began
    seconds = [a.seconds for a in answers]
    told = [(truth, a.p_yes >= 0.5) for a, (_, truth) in zip(answers, questions, strict=True) if a.p_yes is not None]
    return {
        "id": judge.id,
        "p_yes_from_token_probabilities": "votes" not in judge.id,
        "asked": len(asks),
        "answered": len(told),
        "latency_p50_s": float(np.percentile(seconds, 50)),
        "latency_p95_s": float(np.percentile(seconds, 95)),
        "questions_per_s": len(asks) / wall,
        "repeat_noise": _noise(judge, asks[:REPEATED]),
        "agreement_where_yes_is_right": _mean([said for truth, said in told if truth]),
        "agreement_where_no_is_right": _mean([not said for truth, said in told if not truth]),
        "retries": judge.usage.retries,
        "failures": dict(judge.usage.reasons),
    }


def _opened(model: str, url: str | None, key_env: str | None, ask: "Ask") -> "Judge":
    """The judge, with votes if its server gives no token probabilities. Raises RlhfImgError if it does not answer."""
    from rlhf_img.judges import JudgeConfig, open_judge

    # The doctor counts failures rather than stop at them.
    config = JudgeConfig(model=model, url=url, api_key_env=key_env, max_failed=1.0, canary_every=0)
    for one in (config, dataclasses.replace(config, votes=VOTES)):
        judge = open_judge(one)
        (answer,) = judge.ask([ask])
        if answer.p_yes is not None:
            return judge
        if "votes" not in str(answer.reason):
            break
    raise RlhfImgError(f"the judge {model} does not answer: {answer.reason}")


def _questions(images: int) -> "list[tuple[Ask, bool]]":
    """Questions about rendered images, with the truth that the exact checks know. Half of the captions that they come
    from are wrong in one fact, so that no is the right answer too."""
    from rlhf_img.judges import Ask
    from rlhf_img.playground.data import example
    from rlhf_img.rubrics import decompose, score
    from rlhf_img.rubrics.questions import question_of

    questions = []
    for seed in range(images):
        shown = example(seed, wrong_captions=0.5)
        rubric = decompose(shown.caption).rubric
        passed = {r.id: r.passed for r in score(rubric, shown.image).requirements}
        for r in rubric.requirements:
            question, verdict = question_of(r), passed[r.id]
            # What needs a thing that is not there has no right answer.
            if question is not None and verdict is not None and all(passed[need] for need in r.needs):
                questions.append((Ask(image=shown.image, question=question), verdict == (r.expect == "present")))
    return questions


def _noise(judge: "Judge", asks: "list[Ask]") -> float | None:
    """The mean over questions of the standard deviation of P(yes) over repeats."""
    answers = judge.ask(asks * REPEATS)
    repeated = [[a.p_yes for a in answers[i :: len(asks)] if a.p_yes is not None] for i in range(len(asks))]
    return _mean([statistics.pstdev(values) for values in repeated if len(values) > 1])


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
