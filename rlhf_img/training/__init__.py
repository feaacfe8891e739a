"""Runs: the loop, run directory, exact resume, pre-flight check, sentinels, prompts and held-out evaluation."""
