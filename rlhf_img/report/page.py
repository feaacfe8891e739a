"""Puts a report together: what each section shows, worked out here; how it looks is in templates/."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf_img.config import yaml_text
from rlhf_img.errors import RlhfImgError
from rlhf_img.report.charts import Line, line_chart, short
from rlhf_img.report.images import Strip, data_uri, strips
from rlhf_img.report.load import Checkpoint, Interval, Run, load_run
from rlhf_img.report.notes import derived_notes
from rlhf_img.report.ported import Ported, load_ported
from rlhf_img.report.sentinels import EXPLAINED, PLACE, Sentinels, bands, load_sentinels

_EXPLAINED = {
    "rubric/pass_all": "share of training images that meet every requirement",
    "rubric/pass_requirement": "share of single requirements met",
    "kl": "distance from the model it began with",
    "ratio/max_dev": "largest |ratio − 1| between training and rollout",
    "clip_fraction": "share of samples whose ratio was clipped",
    "grad_norm": "gradient norm before clipping",
    "ties": "share of pairs within a group with equal rewards",
    "zero_spread_groups": "share of groups that teach nothing: all rewards equal",
    "advantage/std": "spread of the advantages",
    "lr": "learning rate",
    "dm": "TDM: size of the pull from the student's law to the teacher's",
    "guidance": "TDM: size of the pull of guidance; at the end the two should balance",
    "norm": "TDM: what an image's loss is divided by",
    "critic/loss": "TDM: error of the critic; much of it is noise that no critic can predict",
    "critic/grad_norm": "TDM: the critic's gradient norm before clipping",
    "pairs/margin": "implicit margin: how much further the policy has moved towards the winner than towards the loser",
    "pairs/accuracy": "share of pairs with a margin above 0",
    "pairs/decided": "mean probability that the winner wins",
    "pairs/winner_rise": "winners' error against the reference's; above 0 they have become less likely",
    "pairs/loser_rise": "losers' error against the reference's",
    "pairs/drift": "mean squared distance of velocities from the reference's",
    "pairs/loser_gradient": "share of the losers' gradient that the guard let through",
    "heldout/accuracy": "share of held-out pairs with a margin above 0",
    "heldout/winner_rise": "held-out winners' error against the reference's; above 0 they have become less likely",
    "heldout/loser_rise": "held-out losers' error against the reference's",
    "heldout/drift": "mean squared distance of velocities from the reference's, on held-out pairs",
    "beta_mean": "strength of the preference, on errors averaged over dimensions",
    "beta_sum": "strength of the preference, on summed errors",
    "loss/low": "SFT: error at noise levels below 1/3",
    "loss/middle": "SFT: error at the levels between",
    "loss/high": "SFT: error at noise levels above 2/3, where layout is decided",
    "loss": "not comparable between steps; no measure of quality",
    "judge/calls": "questions that the judge was asked",
    "judge/failed": "of these, without an answer: left unscored",
    "judge/retries": "requests sent again",
    "judge/seconds_mean": "seconds a question, its retries included",
    "judge/seconds_p95": "95 of 100 questions took no longer",
    "judge/drift": "change of P(yes) on the canary questions since the start",
    "judge/flipped": "share of the canary questions that are now answered otherwise",
    "pool/seen": "share of the prompts with at least one group so far",
    "pool/difficulty": "1 − mean score of the prompts seen so far, on the rewards' ranges",
    "pool/spread": "typical spread within a group, on the rewards' ranges",
    "pool/retired": "prompts at rest: their last groups showed no spread",
    "pool/effective": "how many equally likely prompts would be as varied as this draw",
    "panel/score": "what decides which weights are kept, and when to stop",
    "panel/saturation": "mean colour saturation on the panel",
    "transfer/gain": "what the trained rewards gained on held-out prompts, in spreads of Raw",
}
_EXPLAINED |= {f"sentinel/{name}": text for name, text in EXPLAINED.items()}
_GROUPS = {
    "Rewards": ("reward/", "rubric/"),
    "Sentinels, as the share of Raw's images below the policy's; grey is the band": ("sentinel/",),
    "Transfer: what held-out rewards gained for each spread that the trained ones gained": ("transfer/",),
    "Pairs: a margin that grows while both images become less likely is divergence": ("pairs/", "heldout/"),
    "Validation panel: when it was best, the weights were kept": ("panel/",),
    "Prompt pool: which prompts are drawn, and what they teach": ("pool/", "zero_spread_groups"),
    "Judge": ("judge/",),
    "Optimisation": ("",),
}
_PARTS = ("rollout", "reward", "train")


class Delta(NamedTuple):
    """A score before and after, with the interval of the difference where it was measured."""

    label: str
    before: Interval | None
    after: Interval | None
    difference: Interval | None

    @property
    def verdict(self) -> Literal["better", "worse", "unclear", "unknown"]:
        """What the interval of the difference allows to say."""
        if self.difference is None:
            return "unknown"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "unclear"


class Chart(NamedTuple):
    """One metric of all runs."""

    key: str
    explained: str
    latest: str
    svg: Markup


class TimeShare(NamedTuple):
    """Seconds spent on one part of the steps, its share of all, and seconds a step."""

    part: str
    seconds: float
    share: float
    per_step: float


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the template shows of one run."""

    run: Run
    index: int
    name: str
    algorithm: str
    headline: Delta
    tiles: tuple[Delta, ...]
    diversity: Interval | None
    by_check: tuple[Delta, ...]
    strips: tuple[Strip, ...]
    card_sheet: str | None
    ported: Ported | None
    sentinels: Sentinels | None
    times: tuple[TimeShare, ...]
    seconds: float | None
    steps: int
    facts: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    config_yaml: str
    versions: dict[str, Any]


def build(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one standalone HTML file on one run, or on several side by side, and returns its path.

    Without `out` it is `report.html` in the run's folder; for several runs, in the folder that holds the first.
    Raises RlhfImgError if a folder holds no run or the file cannot be written.
    """
    if not run_dirs:
        raise RlhfImgError("a report needs at least one run directory")
    views = [_view(load_run(path), index) for index, path in enumerate(run_dirs)]
    target = out or (run_dirs[0] if len(run_dirs) == 1 else run_dirs[0].parent) / "report.html"
    html = environment().get_template("page.html.j2").render(views=views, chart_groups=_chart_groups(views))
    hidden = target.with_name(f".partial-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_text(html, encoding="utf-8")
        hidden.replace(target)
    except OSError as error:
        raise RlhfImgError(f"{target} cannot be written: {error.strerror}: give another file to --out") from error
    return target


def environment() -> Environment:
    """What templates are rendered with: everything escaped, nothing undefined."""
    environment = Environment(
        loader=PackageLoader("rlhf_img.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "score": score,
        "signed": signed,
        "short": short,
        "duration": duration,
        "megabytes": megabytes,
        "yaml_text": yaml_text,
    }
    return environment


def _view(run: Run, index: int) -> RunView:
    evaluation = run.evaluation
    before, after = _ends(run)
    difference = evaluation.difference if evaluation else {}
    reward_difference = evaluation.reward_difference if evaluation else {}
    rewards = dict.fromkeys([*(before.rewards if before else ()), *(after.rewards if after else ())])
    checks = dict.fromkeys([*(before.by_check if before else ()), *(after.by_check if after else ())])
    scores = {name: _delta(name, before, after, "scores", difference) for name in ("pass_all", "pass_requirement")}
    notes = list(run.notes)
    ported = load_ported(run.path, notes)
    return RunView(
        run=run,
        index=index,
        name=run.path.resolve().name,
        algorithm=str(run.config.get("algorithm", "run")).upper(),
        headline=scores["pass_all"],
        tiles=tuple(_delta(name, before, after, "rewards", reward_difference) for name in rewards),
        diversity=difference.get("diversity_ratio"),
        by_check=(
            *(_delta(name, before, after, "by_check", {}) for name in checks),
            scores["pass_requirement"]._replace(label="any requirement"),
            scores["pass_all"]._replace(label="all of a prompt"),
        ),
        strips=tuple(strips(run)),
        card_sheet=data_uri(run.card.sheet, 1024) if run.card else None,
        ported=ported,
        sentinels=load_sentinels(run),
        times=tuple(_times(run.metrics)),
        seconds=_total(run.metrics, "time/step"),
        steps=len(run.metrics.get("step", [])),
        facts=tuple(_facts(run)),
        counts=tuple(_counts(run)),
        notes=(*notes, *derived_notes(run)),
        config_yaml=yaml.safe_dump(run.config.get("config") or {}, sort_keys=False, allow_unicode=True),
        versions=dict(run.config.get("versions") or {}),
    )


def _ends(run: Run) -> tuple[Checkpoint | None, Checkpoint | None]:
    checkpoints = run.evaluation.checkpoints if run.evaluation else {}
    return checkpoints.get("before"), checkpoints.get("after")


def _delta(
    name: str,
    before: Checkpoint | None,
    after: Checkpoint | None,
    kind: Literal["scores", "rewards", "by_check"],
    difference: dict[str, Interval],
) -> Delta:
    def pick(checkpoint: Checkpoint | None) -> Interval | None:
        if checkpoint is None:
            return None
        table = {"scores": checkpoint.scores, "rewards": checkpoint.rewards, "by_check": checkpoint.by_check}[kind]
        return table.get(name)

    return Delta(name, pick(before), pick(after), difference.get(name))


def _chart_groups(views: Sequence[RunView]) -> dict[str, list[Chart]]:
    """Every metric once, in the first group that claims it. Step, times and counts that stay 0 have no curve."""
    keys = dict.fromkeys(key for view in views for key in view.run.metrics)
    left = [key for key in keys if key != "step" and not key.startswith("time/")]
    left = [k for k in left if f"{k}{PLACE}" not in keys and k != "sentinel/out"]
    left = [k for k in left if not k.endswith("/unscored") or any(any(v.run.metrics.get(k, ())) for v in views)]
    groups: dict[str, list[Chart]] = {}
    for title, prefixes in _GROUPS.items():
        mine = [key for key in left if key.startswith(prefixes)]
        left = [key for key in left if key not in mine]
        groups[title] = [_chart(key, views) for key in mine]
    return {title: charts for title, charts in groups.items() if charts}


def _chart(key: str, views: Sequence[RunView]) -> Chart:
    lines = []
    for view in views:
        values = view.run.metrics.get(key, [])
        steps = view.run.metrics.get("step", [])
        pairs = [(x, y) for x, y in zip(steps, values, strict=True) if x is not None] if values else []
        lines.append(Line(view.name, view.index, [x for x, _ in pairs], [y for _, y in pairs]))
    lasts = [[y for y in line.y if y is not None][-1:] for line in lines]
    latest = " / ".join(short(last[0]) if last else "none" for last in lasts)
    band = next((found[key] for view in views if key in (found := bands(view.run))), None)
    return Chart(key, _EXPLAINED.get(key.removesuffix(PLACE), ""), latest, line_chart(key, lines, band))


def _times(metrics: dict[str, list[float | None]]) -> list[TimeShare]:
    total = _total(metrics, "time/step")
    if not total:
        return []
    steps = len(metrics["step"])
    spent = [(part, _total(metrics, f"time/{part}") or 0.0) for part in _PARTS]
    spent.append(("everything else", max(0.0, total - sum(seconds for _, seconds in spent))))
    return [TimeShare(part, seconds, seconds / total, seconds / steps) for part, seconds in spent]


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in the order a reader asks."""
    versions = run.config.get("versions") or {}
    kept = run.evaluation.settings.get("kept_step") if run.evaluation else None
    facts = [
        ("command", run.config.get("command")),
        ("seed", run.config.get("seed")),
        ("hardware", versions.get("hardware")),
        ("code", " ".join(str(versions[key]) for key in ("rlhf-img", "git") if key in versions)),
        ("weights kept", f"of step {kept}, best on the validation panel" if kept else None),
        ("folder", run.path),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _counts(run: Run) -> list[tuple[str, str]]:
    """What gave no signal: unscored images, ties, groups without spread."""
    counts = []
    for key, values in run.metrics.items():
        known = [v for v in values if v is not None]
        if key.startswith("reward/") and key.endswith("/unscored") and known:
            counts.append((f"{key.split('/')[1]}: unscored in training", f"{sum(known):g} images"))
        elif key == "judge/failed" and known:
            counts.append(("judge: questions without an answer", f"{sum(known):g}"))
        elif key in ("ties", "zero_spread_groups") and known:
            label = "ties" if key == "ties" else "groups without spread"
            counts.append((f"{label}, mean over steps", short(sum(known) / len(known))))
    for checkpoint in run.evaluation.checkpoints.values() if run.evaluation else ():
        counts += [(f"{name}: unscored, {checkpoint.name}", f"{n} images") for name, n in checkpoint.unscored.items()]
    return counts


def _total(metrics: dict[str, list[float | None]], key: str) -> float | None:
    known = [v for v in metrics.get(key, []) if v is not None]
    return sum(known) if known else None


def percent(value: float) -> str:
    """A share as a percentage.

    >>> percent(0.4123)
    '41\\xa0%'
    """
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(-0.051)
    '−5.1'
    """
    return _sign(f"{100 * value:+.1f}")


def score(value: float) -> str:
    """A reward, to two places."""
    return _sign(f"{value:.2f}")


def signed(value: float) -> str:
    """A difference with its sign, to three places."""
    return _sign(f"{value:+.3f}")


def _sign(text: str) -> str:
    return text.replace("-", "−")


def megabytes(count: float) -> str:
    """Bytes for people.

    >>> megabytes(1_500_000_000)
    '1500\\xa0MB'
    """
    return f"{count / 1e6:.0f}\N{NO-BREAK SPACE}MB"


def duration(seconds: float) -> str:
    """A time that people read.

    >>> [duration(s) for s in (0.25, 42, 312, 7260)]
    ['0.25 s', '42 s', '5 min 12 s', '2 h 01 min']
    """
    if seconds < 10:
        return f"{seconds:.2f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
