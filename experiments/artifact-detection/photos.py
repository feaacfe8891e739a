"""Copies photographs into a folder: those inside the wheels of scikit-image and scikit-learn, and of Debian packages.

    python photos.py FOLDER [ROOT]

ROOT: where the packages of `DEBIAN` are installed ("/") or unpacked (`dpkg-deb -x`); without it, the wheels' alone.
"""

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
DEBIAN = {
    "lomiri-wallpapers-16.04, lomiri-wallpapers-20.04": ("usr/share/backgrounds/{}.jpg", (
        "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus", "Picture_0B_by_freespace",
        "Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
        "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi",
    )),
    "mate-backgrounds": ("usr/share/backgrounds/mate/nature/{}.jpg", (
        "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings",
        "Wood", "YellowFlower",
    )),
    "plasma-workspace-wallpapers": ("usr/share/wallpapers/{}/contents/images/2560x1600.jpg", (
        "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
        "OneStandsOut", "Path", "summer_1am",
    )),
}  # fmt: skip
"""Packages, and where their photographs are: without paintings and drawings, each picture in one size."""


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install 'rlhf-img[dev]'")
    return Path(spec.submodule_search_locations[0])


def debian(root: Path) -> dict[str, Path]:
    """The photographs of Debian's packages, by the names that they get."""
    found = {}
    for packages, (pattern, names) in DEBIAN.items():
        for name in names:
            found[f"{name}.jpg"] = root / pattern.format(name)
            if not found[f"{name}.jpg"].is_file():
                sys.exit(f"{found[f'{name}.jpg']} is missing: apt-get download and unpack {packages}")
    return found


def main() -> None:
    out = Path(sys.argv[1])
    wheels = {"skimage/data": SCIKIT_IMAGE, "sklearn/datasets/images": SCIKIT_LEARN}
    found = {name: folder_of(where.split("/")[0]) / where.split("/", 1)[1] / name
             for where, names in wheels.items() for name in names}
    found |= debian(Path(sys.argv[2])) if len(sys.argv) > 2 else {}
    out.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        shutil.copy(path, out / name)
    print(f"{len(found)} photographs in {out}")


if __name__ == "__main__":
    main()
