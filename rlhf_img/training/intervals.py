"""Means with bootstrap intervals, over the entries that are known."""

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float] | np.ndarray, resamples: int = 2000) -> dict[str, float | int | None]:
    """Mean and 95 % percentile-bootstrap interval over the entries that are known."""
    known = as_array(values)
    known = known[~np.isnan(known)]
    if not known.size:
        return {"mean": None, "low": None, "high": None, "n": 0}
    means = known[_resample(known.size, resamples)].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": int(known.size)}


def ratio_interval(top: np.ndarray, bottom: np.ndarray, resamples: int = 2000) -> dict[str, float | int | None]:
    """mean(top) / mean(bottom) of paired entries, with its 95 % percentile-bootstrap interval."""
    if not top.size or bottom.mean() == 0:
        return {"mean": None, "low": None, "high": None, "n": int(top.size)}
    rows = _resample(top.size, resamples)
    low, high = np.percentile(top[rows].mean(1) / bottom[rows].mean(1), [2.5, 97.5])
    return {"mean": float(top.mean() / bottom.mean()), "low": float(low), "high": float(high), "n": int(top.size)}


def _resample(size: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(size, size=(resamples, size))


def as_array(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Of floats, NaN where a value is None."""
    return np.asarray(values, dtype=float)  # JSON's null becomes NaN
