"""The strict loader: what it takes, what it refuses, and that each refusal tells what to do."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlhf_img import config
from rlhf_img.errors import RlhfImgError


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 8
    """Rank of the
    update."""
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    prompts: str
    """Where the prompts are."""
    lr: float = 1e-4
    """Learning rate."""
    resume: bool = False
    kind: Literal["sde", "cps"] = "sde"
    rewards: tuple[str, ...] = ("rubric",)
    window: tuple[int, int] = (0, 4)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def load(**values: object) -> Example:
    return config.from_mapping(Example, {"prompts": "p.txt", **values}, "grpo")


def test_values_arrive_in_the_annotated_types() -> None:
    loaded = load(lr="1e-3", rewards=["rubric", "artifact"], window=[2, 5], lora={"rank": 4, "alpha": 8}, kind="cps")
    assert loaded == Example(
        prompts="p.txt",
        lr=1e-3,
        rewards=("rubric", "artifact"),
        window=(2, 5),
        lora=Lora(rank=4, alpha=8.0),
        kind="cps",
    )
    assert isinstance(loaded.lora.alpha, float)
    assert load(lora={"alpha": None}).lora.alpha is None
    assert isinstance(load(lr=1).lr, float)
    assert load(lora={"rank": 16.0}).lora.rank == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lrr": 1}, r'grpo: unknown key "lrr": did you mean "lr"\?'),
        ({"lora": {"rnk": 1}}, r'grpo.lora: unknown key "rnk": did you mean "rank"\?'),
        ({"lr": "fast"}, r"grpo.lr: expected number, got 'fast'"),
        ({"lr": True}, r"grpo.lr: expected number, got True"),
        ({"lr": -1}, r"grpo: lr must be positive, got -1.0"),
        ({"lora": {"rank": 1.5}}, r"grpo.lora.rank: expected whole number, got 1.5"),
        ({"lora": {"rank": True}}, r"grpo.lora.rank: expected whole number, got True"),
        ({"lora": {"rank": None}}, r"grpo.lora.rank: expected whole number, got None"),
        ({"lora": 3}, r"grpo.lora: expected keys with values, got 3"),
        ({"lora": {"alpha": "x"}}, r"grpo.lora.alpha: expected number, got 'x'"),
        ({"resume": 1}, r"grpo.resume: expected true or false, got 1"),
        ({"kind": "csp"}, r'grpo.kind: expected one of sde, cps, got \'csp\'; did you mean "cps"\?'),
        ({"rewards": "rubric"}, r"grpo.rewards: expected a list such as \[a, b\], got 'rubric'"),
        ({"rewards": ["rubric", 3]}, r"grpo.rewards\[1\]: expected text, got 3"),
        ({"window": [1, 2, 3]}, r"grpo.window: expected 2 values, got 3"),
        ({"prompts": None}, r"grpo.prompts: expected text, got None"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(RlhfImgError, match=message):
        load(**values)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RlhfImgError, match="grpo: missing prompts"):
        config.from_mapping(Example, {}, "grpo")


def test_overrides_nest_and_the_later_one_wins() -> None:
    given = config.parse_overrides(["lora.rank=4", "lora.alpha=2.5", "lora.rank=16", "kind=cps", "lr=1e-3", "a=b=c"])
    assert given == {"lora": {"rank": 16, "alpha": 2.5}, "kind": "cps", "lr": "1e-3", "a": "b=c"}


@pytest.mark.parametrize("pair", ["lr", "=3", "lora..rank=3", "x=[1"])
def test_a_broken_override_is_shown(pair: str) -> None:
    with pytest.raises(RlhfImgError, match=r"key=value|not YAML"):
        config.parse_overrides([pair])


def test_merge_keeps_what_is_not_named_and_changes_no_argument() -> None:
    base = {"lora": {"rank": 8, "alpha": 1}, "rewards": ["a", "b"]}
    assert config.merge(base, {"lora": {"rank": 4}, "rewards": ["c"]}) == {
        "lora": {"rank": 4, "alpha": 1},
        "rewards": ["c"],
    }
    assert base == {"lora": {"rank": 8, "alpha": 1}, "rewards": ["a", "b"]}


def test_mapping_and_back() -> None:
    original = load(lora={"rank": 3}, rewards=["x"])
    mapping = config.to_mapping(original)
    assert mapping["lora"] == {"rank": 3, "alpha": None}
    assert mapping["rewards"] == ["x"]
    assert config.from_mapping(Example, mapping, "grpo") == original


def test_yaml_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(RlhfImgError, match=r"run.yaml: cannot be read: No such file"):
        config.load_yaml(path)
    path.write_text("lr: 1\nlora: [1\nkind: sde\n")
    with pytest.raises(RlhfImgError, match=r"run.yaml, line 3: not valid YAML"):
        config.load_yaml(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(RlhfImgError, match=r"expected `key: value` lines"):
        config.load_yaml(path)
    path.write_text("")
    assert config.load_yaml(path) == {}


def test_describe_lists_nested_settings_with_their_docs() -> None:
    docs = {doc.key: doc for doc in config.describe(Example)}
    assert docs["prompts"] == ("prompts", "text", "required", "Where the prompts are.")
    assert docs["lr"] == ("lr", "number", "0.0001", "Learning rate.")
    assert docs["lora.rank"] == ("lora.rank", "whole number", "8", "Rank of the update.")
    assert docs["lora.alpha"].type == "number | null"
    assert docs["kind"].type == "sde | cps"
    assert docs["rewards"].default == "[rubric]"


def test_versions_are_plain_text() -> None:
    versions = config.versions()
    assert versions["python"].startswith("3.")
    assert versions["torch"].startswith("2.")
    assert all(isinstance(value, str) and value for value in versions.values())
