"""Where a defect goes: shapes and points of bool masks (H, W), for drawn and for photographed pictures."""

import numpy as np
from scipy import ndimage


def pick(objects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One object's mask (H, W)."""
    return objects[rng.integers(len(objects))]


def point_in(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Row and column of a random pixel of the mask."""
    points = np.argwhere(mask)
    y, x = points[rng.integers(len(points))]
    return int(y), int(x)


def radius_of(mask: np.ndarray) -> float:
    """Radius in pixels of the disc with the mask's area."""
    return float(np.sqrt(mask.sum() / np.pi))


def center_of(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the mask's centre of gravity."""
    y, x = np.round(np.argwhere(mask).mean(axis=0))
    return int(y), int(x)


def color_of(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Median colour (3,) of an image (H, W, 3) under the mask."""
    return np.median(image[mask], axis=0)


def disc(radius: float) -> np.ndarray:
    """A disc that fills its square."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.hypot(y, x) <= radius


def ragged_blob(
    shape: tuple[int, ...], y: float, x: float, radius: float, raggedness: float, rng: np.random.Generator
) -> np.ndarray:
    """A disc whose radius jumps by +- `raggedness` of itself from one of 14 directions to the next; bool (H, W)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    angle = np.arctan2(rows - y, columns - x)
    reach = radius * (1 + raggedness * rng.uniform(-1, 1, 15))
    turn = (angle + np.pi) / (2 * np.pi) * 14
    return np.hypot(rows - y, columns - x) <= np.interp(turn, np.arange(15), reach)


def nearest_points(first: np.ndarray, second: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two pixels of two objects that lie closest together."""
    distance, indices = ndimage.distance_transform_edt(~second, return_indices=True)
    y, x = np.unravel_index(np.where(first, distance, np.inf).argmin(), first.shape)
    return (int(y), int(x)), (int(indices[0, y, x]), int(indices[1, y, x]))
