"""What a run has changed, as a table on the terminal."""

from pathlib import Path
from typing import Any


def print_outcome(console: Any, result: dict[str, Any], page: Path, seconds: float) -> None:
    """Held-out figures before and after, as eval.json has them, and where the report is; `console` is rich's."""
    from rich.table import Table

    before, after = result["checkpoints"]
    table = Table("held-out", "before", "after", "difference (95 % interval)")
    rows = [("all requirements met", "pass_all"), ("single requirements met", "pass_requirement")]
    for title, key in rows:
        change = result["difference"][key]
        if change["mean"] is None:
            continue
        table.add_row(
            title, f"{before[key]['mean']:.1%}", f"{after[key]['mean']:.1%}",
            f"{change['mean'] * 100:+.1f} points ({change['low'] * 100:+.1f} to {change['high'] * 100:+.1f})",
        )  # fmt: skip
    for name, change in result["difference"]["rewards"].items():
        if change["mean"] is None:
            continue
        table.add_row(
            f"reward: {name}", f"{before['rewards'][name]['mean']:.3f}", f"{after['rewards'][name]['mean']:.3f}",
            f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})",
        )  # fmt: skip
    ratio = result["difference"]["diversity_ratio"]
    table.add_row("diversity", "1", f"{ratio['mean']:.2f}", f"ratio {ratio['low']:.2f} to {ratio['high']:.2f}")
    if "high_freq_ratio" in result["difference"]:
        ratio = result["difference"]["high_freq_ratio"]
        table.add_row("fine detail", "1", f"{ratio['mean']:.2f}", f"ratio {ratio['low']:.2f} to {ratio['high']:.2f}")
    console.print(table)
    console.print(f"{seconds / 60:.1f} minutes. Report: {page}", soft_wrap=True)
