"""Where rewards come from: built-in names, files, installed packages; and every way that can go wrong."""

import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards import loading
from rlhf_img.rewards.loading import known_rewards, load_rewards
from rlhf_img.rewards.protocol import Images
from rlhf_img.rewards.scoring import score

PACKAGE = Path(__file__).parent / "plugin_package"

PLUGIN = """
def neon(prompts, images, *, strength=1.0, **columns):
    return [strength] * len(images)

def likes(prompts, images, **columns):
    return [5.0] * len(images)

likes.name = "crowd"
likes.range = (-10, 10)
likes.floor = 0.5
likes.group = True

number = 3
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(PLUGIN)
    return str(path)


def test_built_in_names_and_weights():
    rubric, artifact = load_rewards(" rubric:2 , artifact")
    assert (rubric.name, rubric.weight, rubric.source) == ("rubric", 2.0, "built-in")
    assert (artifact.name, artifact.weight, artifact.range, artifact.role) == ("artifact", 1.0, (0.0, 1.0), "gate")


def test_a_function_in_a_file_with_its_attributes(plugin):
    neon, crowd = load_rewards(f"{plugin}:neon:0.5,{plugin}:likes")
    assert (neon.name, neon.weight, neon.range, neon.floor, neon.group) == ("neon", 0.5, (0.0, 1.0), 0.02, False)
    assert (crowd.name, crowd.range, crowd.floor, crowd.group) == ("crowd", (-10.0, 10.0), 0.5, True)
    assert crowd.source == plugin


def test_a_list_overrides_what_the_function_declares(plugin):
    spec = [{"reward": f"{plugin}:likes", "name": "fans", "weight": 3, "range": [0, 5], "role": "gate", "below": 1,
             "cap": 0.1, "floor": 0.25, "group": False},
            {"reward": f"{plugin}:neon", "options": {"strength": 0.75}}]
    fans, neon = load_rewards(spec)
    assert (fans.name, fans.weight, fans.range, fans.role) == ("fans", 3, (0.0, 5.0), "gate")
    assert (fans.below, fans.cap, fans.floor, fans.group) == (1, 0.1, 0.25, False)
    scores = score([neon], ["p"], Images(torch.zeros(1, 3, 4, 4)))
    assert scores.values_BK.tolist() == [[0.75]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rubrik", 'no reward is called "rubrik"; did you mean "rubric"'),
        ("", "an empty reward"),
        ("rubric,,artifact", "an empty reward"),
        ("rubric:heavy", '"heavy" in "rubric:heavy" is not a weight'),
        ("rubric:nan", "is not a weight"),
        ("rubric:-1", "weight is a number of at least 0"),
        ("rubric,rubric", "two rewards are called rubric"),
        ("FILE", "which function"),
        ("FILE:neo", 'defines no "neo"; did you mean "neon"'),
        ("FILE:number", "is a int, not a function"),
        ("nowhere.py:neon", "no file nowhere.py"),
        ([], "no rewards given"),
        ([{"name": "rubric"}], "at least `reward: NAME`"),
        ([{"reward": "rubric", "wieght": 2}], 'no setting "wieght"; did you mean "weight"'),
        ([{"reward": "rubric", "weight": "2"}], "weight is a number; given '2'"),
        ([{"reward": "rubric", "range": 3}], "range is"),
        ([{"reward": "rubric", "role": "judge"}], 'role is one of objective, gate, both, measure; given'),
        ([{"reward": "FILE:likes", "range": [float("-inf"), float("inf")], "floor": 0}], "floor is"),
        ([{"reward": "FILE:neon", "range": [float("-inf"), float("inf")]}], "no floor"),
        ([{"reward": "FILE:neon", "options": {"strenght": 1}}], 'no option "strenght"; did you mean "strength"'),
    ],
)
def test_what_cannot_be_loaded_says_why(plugin, spec, message):
    if isinstance(spec, str):
        spec = spec.replace("FILE", plugin)
    else:
        spec = [{**entry, **({"reward": entry["reward"].replace("FILE", plugin)} if "reward" in entry else {})}
                for entry in spec]
    with pytest.raises(RlhfImgError) as raised:
        load_rewards(spec)
    assert message in str(raised.value)


def test_a_file_that_fails_to_load_names_the_line(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(RlhfImgError, match=r"bad.py failed to load: ZeroDivisionError.*bad.py:2") as raised:
        load_rewards(f"{path}:neon")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_two_packages_with_one_name_are_not_chosen_between(monkeypatch):
    points = [EntryPoint("neon", f"{module}:neon", loading.ENTRY_POINT_GROUP) for module in ("one", "two")]
    monkeypatch.setattr(loading, "entry_points", lambda group: points)
    with pytest.raises(RlhfImgError, match='"neon" is offered by module one:neon and by module two:neon'):
        load_rewards("neon")
    monkeypatch.setattr(loading, "entry_points",
                        lambda group: [EntryPoint("rubric", "one:rubric", loading.ENTRY_POINT_GROUP)])
    with pytest.raises(RlhfImgError, match='"rubric" is offered by built-in and by module one'):
        load_rewards("rubric")


def test_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "site"
    # A copy, because building leaves files beside the sources.
    for file in PACKAGE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            copy = source / file.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--target", str(target), str(source)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    monkeypatch.syspath_prepend(str(target))
    importlib.invalidate_caches()

    assert known_rewards()["neon"] == "package neon-reward"
    (neon,) = load_rewards("neon:0.5")
    assert (neon.name, neon.weight, neon.floor, neon.source) == ("neon", 0.5, 0.01, "package neon-reward")
    pixels = torch.tensor([1.0, 0.0, 0.2]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert score([neon], ["neon"], Images(pixels)).values_BK.tolist() == [[1.0]]

    with pytest.raises(RlhfImgError, match="reward broken-neon .package neon-reward.: loading neon_reward.broken:neon "
                                           "failed: ModuleNotFoundError: No module named 'a_package_that_nobody_has'"):
        load_rewards("broken-neon")
    with pytest.raises(RlhfImgError, match='no reward is called "neno"; did you mean "neon"'):
        load_rewards("neno")
