"""What a reader should know before believing a report."""

from rlhf_img.judges.canary import TOLERANCE
from rlhf_img.report.load import Run


def derived_notes(run: Run) -> list[str]:
    """Limits of what this run shows, worked out from what it wrote."""
    return [*_about_evaluation(run), *_about_training(run)]


def _about_evaluation(run: Run) -> list[str]:
    if run.evaluation is None:
        return []
    notes = []
    checkpoints = run.evaluation.checkpoints
    for name in ("before", "after"):
        if name not in checkpoints:
            notes.append(f'The evaluation has no checkpoint "{name}", so nothing can be said about a change.')
    others = [name for name in checkpoints if name not in ("before", "after")]
    if others:
        notes.append(f"Also evaluated, but not shown: {', '.join(others)}.")
    if "pass_all" in run.evaluation.difference:
        notes.append(
            "The intervals come from resampling the held-out prompts of this one run. "
            "They do not cover another training seed, which may come out differently."
        )
    unscored = {name for c in checkpoints.values() for name, count in c.unscored.items() if count}
    if unscored:
        notes.append(f"Some held-out images are unscored ({', '.join(sorted(unscored))}): its means leave them out.")
    return notes


def _about_training(run: Run) -> list[str]:
    if not run.metrics:
        return []
    notes = []
    trained_on = dict.fromkeys(key.split("/")[1] for key in run.metrics if key.startswith("reward/"))
    if trained_on:
        notes.append(
            f"Trained on: {', '.join(trained_on)}. A reward that is trained on can rise without images getting better; "
            "the pictures and the sentinels are there to tell."
        )
    drift = max((value for value in run.metrics.get("judge/drift", []) if value is not None), default=0.0)
    if drift > TOLERANCE:
        notes.append(
            f"The judge has changed: its answers to the canary questions moved by up to {drift:.2f} during training. "
            "Scores from early and late steps are not comparable."
        )
    if not any(key.startswith("sentinel/") for key in run.metrics):
        notes.append("No sentinels were recorded, so reward hacking would go unseen here.")
    elif not any(key.startswith("sentinel/reward/") for key in run.metrics):
        notes.append("Every reward that was measured was also trained on: give eval.rewards one of another family.")
    if "kl" not in run.metrics:
        notes.append("The distance from the original model (KL) was not recorded.")
    if "time/step" not in run.metrics:
        notes.append("Times were not recorded.")
    return notes
