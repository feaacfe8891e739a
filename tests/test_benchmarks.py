"""The stock side of the benchmarks is another forward with the same gradients; the type checker reads the rest."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_steps(tmp_path: Path) -> None:
    words = ["sft", "text", "--repeats", "1", "--json", str(tmp_path / "steps.json")]
    subprocess.run([sys.executable, "benchmarks/steps.py", *words], cwd=ROOT, check=True, timeout=300)
    found = json.loads((tmp_path / "steps.json").read_text())
    step, text = found["rows"]
    assert 0 < step["gradients differ by"] < 1e-3  # 0 would be one forward against itself
    assert step["times faster"] > 1
    assert text["stock, s"] > 0
    parts = {row["part of a GRPO step"] for row in found["profile"]}
    assert {"rollout: forwards", "training: forwards", "training: backward", "decoding", "text"} <= parts
