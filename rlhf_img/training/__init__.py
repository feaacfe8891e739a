"""Runs: the loop, the run directory and exact resume, the pre-flight check, sentinels, prompts and held-out evaluation."""
