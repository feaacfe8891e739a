"""Copies the photographs that scikit-image and scikit-learn bring inside their wheels: python photos.py FOLDER"""

import importlib.util
import shutil
import sys
from pathlib import Path

SCIKIT_IMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""Without drawings, scanned pages, a shot blurred by motion, and the second half of the stereo pair."""
SCIKIT_LEARN = ("china.jpg", "flower.jpg")


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install 'rlhf-img[dev]'")
    return Path(spec.submodule_search_locations[0])


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for package, under, names in (("skimage", "data", SCIKIT_IMAGE), ("sklearn", "datasets/images", SCIKIT_LEARN)):
        for name in names:
            shutil.copy(folder_of(package) / under / name, out / name)
    print(f"{len(SCIKIT_IMAGE) + len(SCIKIT_LEARN)} photographs in {out}")


if __name__ == "__main__":
    main()
