"""From a spec to rewards: built-in names, plug-ins of installed packages, and functions in a file."""

import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.rewards.protocol import Reward

BUILTIN: dict[str, str] = {
    "aesthetic": "rlhf_img.rewards.aesthetic:aesthetic",
    "artifact": "rlhf_img.rewards.artifact:artifact",
    "clipscore": "rlhf_img.rewards.clip_scores:clipscore",
    "hpsv3": "rlhf_img.rewards.hpsv3:hpsv3",
    "imagereward": "rlhf_img.rewards.image_reward:imagereward",
    "pickscore": "rlhf_img.rewards.clip_scores:pickscore",
    "residual": "rlhf_img.rewards.residual:residual",
    "rubric": "rlhf_img.rewards.rubric:rubric",
    "variant": "rlhf_img.rewards.variant:variant",
    "vqascore": "rlhf_img.rewards.vqascore:vqascore",
}
"""The rewards of this package and where they are; imported only when asked for."""

ENTRY_POINT_GROUP = "rlhf_img.rewards"

_KEYS = ("reward", "name", "weight", "role", "range", "floor", "below", "cap", "group", "waits", "options")
_REMOTE = "remote:"
_SPEC_HELP = (
    'a spec is "name[:weight]", "path/to/file.py:function[:weight]" or "remote:http://host:port/name[:weight]", '
    'several separated by commas, for example "rubric:2,artifact,my_rewards.py:neon"'
)


def load_rewards(spec: str | Sequence[Mapping[str, Any]]) -> list[Reward]:
    """The rewards of a spec.

    spec: "rubric:2,artifact,my_rewards.py:neon:0.5", or a list as YAML gives it, of mappings with `reward` (as in the
    string, without weight) and, where they should differ from what the function declares, `name`, `weight`, `role`,
    `range`, `floor`, `below`, `cap`, `group`, `waits` and `options` (keyword arguments of the function, or, of a reward
    on another machine, "remote:http://host:port/name", how it is asked).

    Raises RlhfImgError for an unknown name or key (with the nearest one), a name that two packages offer, a plug-in
    that fails to import, and attributes that make no sense.
    """
    entries = [_parse(item) for item in spec.split(",")] if isinstance(spec, str) else list(spec)
    if not entries:
        raise RlhfImgError(f"no rewards given; {_SPEC_HELP}")
    rewards = [_load(entry) for entry in entries]
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RlhfImgError(f"two rewards are called {', '.join(twice)}; give one of them another `name`")
    return rewards


def known_rewards() -> dict[str, str]:
    """Every reward that can be asked for by name, and where it comes from: "built-in" or the package that offers it."""
    offered = {point.name: _package(point) for point in entry_points(group=ENTRY_POINT_GROUP)}
    return dict(sorted((offered | dict.fromkeys(BUILTIN, "built-in")).items()))


def _parse(item: str) -> dict[str, Any]:
    """One item of a spec string as a mapping."""
    text = item.strip()
    reference, weight = text, None
    head, colon, tail = text.rpartition(":")
    is_function = head.endswith(".py") and tail.isidentifier()
    is_port = head.startswith(_REMOTE) and head.count("/") < 3
    if colon and not is_function and not is_port:
        reference = head
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise RlhfImgError(f'"{tail}" in "{text}" is not a weight; {_SPEC_HELP}')
    if not reference:
        raise RlhfImgError(f'an empty reward in the spec ("{item}"); {_SPEC_HELP}')
    return {"reward": reference} | ({} if weight is None else {"weight": weight})


def _load(entry: Mapping[str, Any]) -> Reward:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("reward"), str):
        raise RlhfImgError(f"a reward of a list is a mapping with at least `reward: NAME`; given {entry!r}")
    for key in entry:
        if key not in _KEYS:
            raise RlhfImgError(f'reward {entry["reward"]} has no setting "{key}"; {did_you_mean(str(key), _KEYS)}')
    reference, options = entry["reward"], entry.get("options") or {}
    if reference.startswith(_REMOTE):
        fn, default_name, source = _remote(reference, options), "remote", reference
        options = {}  # taken above
    else:
        fn, default_name, source = _find(reference)
    settings = _declared(fn) | {k: v for k, v in entry.items() if k not in ("reward", "options")}
    settings["name"] = settings.get("name", default_name)
    settings["range"] = _range(settings.get("range", (0.0, 1.0)), settings["name"])
    if "floor" not in settings:
        low, high = settings["range"]
        if not math.isfinite(high - low):
            raise RlhfImgError(
                f"reward {settings['name']} has the range {settings['range']} and no floor. Give `floor`: the standard "
                f"deviation, in its own units, below which differences between images are noise"
            )
        settings["floor"] = 0.02 * (high - low)
    _check_types(settings)
    return Reward(fn=_bind(fn, options, settings["name"]), source=source, **settings)


def _remote(reference: str, options: Mapping[str, Any]) -> Any:
    try:
        from rlhf_img.rewards.remote import RemoteReward
    except ModuleNotFoundError as error:
        missing = f"{reference} needs {error.name}, which is not installed"
        raise RlhfImgError(f"{missing}: pip install 'rlhf-img[remote]'") from error
    return RemoteReward(reference.removeprefix(_REMOTE), options)


def _find(reference: str) -> tuple[Any, str, str]:
    """The callable that a reference means, its default name, and where it comes from."""
    path, colon, attribute = reference.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), attribute), attribute, path
    if reference.endswith(".py"):
        raise RlhfImgError(f"{reference}: which function? Write {reference}:NAME")
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == reference]
    sources = (["built-in"] if reference in BUILTIN else []) + [_package(point) for point in points]
    if len(sources) > 1:
        raise RlhfImgError(
            f'"{reference}" is offered by {" and by ".join(sources)}; uninstall one, or give path/to/file.py:NAME'
        )
    if not sources:
        nearest = did_you_mean(reference, known_rewards())
        raise RlhfImgError(f'no reward is called "{reference}"; {nearest}. {_SPEC_HELP}')
    target = points[0].value if points else BUILTIN[reference]
    return _callable(_import_dotted(target, reference, sources[0]), reference), reference, sources[0]


def _import_dotted(target: str, name: str, source: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise RlhfImgError(f"reward {name} ({source}): loading {target} failed: {_where(error)}") from error
    return found


def _from_file(path: Path, attribute: str) -> Any:
    if not path.is_file():
        raise RlhfImgError(f"no file {path}; give the path of a Python file that defines {attribute}")
    module_name = f"rlhf_img_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RlhfImgError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RlhfImgError(f"{path} failed to load: {_where(error)}") from error
    return _callable(_attribute(module, attribute, path), attribute)


def _attribute(module: ModuleType, name: str, path: Path) -> Any:
    public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    if name not in vars(module):
        raise RlhfImgError(f'{path} defines no "{name}"; {did_you_mean(name, public)}')
    return vars(module)[name]


def _callable(found: Any, name: str) -> Any:
    if not callable(found):
        raise RlhfImgError(f"reward {name} is a {type(found).__name__}, not a function of (prompts, images, **columns)")
    return found


def _declared(fn: Any) -> dict[str, Any]:
    """What the function says of itself in its optional attributes. Its `__name__` is not asked."""
    keys = ("name", "range", "role", "group", "floor", "below", "cap", "waits", "needs")
    offered = {key: getattr(fn, key, None) for key in keys}
    declared = {key: value for key, value in offered.items() if value is not None}
    return declared


def _check_types(settings: Mapping[str, Any]) -> None:
    """YAML and function attributes may hold anything; `Reward` itself checks the ranges of what passes here."""
    name = settings["name"]
    if not isinstance(name, str) or not name:
        raise RlhfImgError(f"the name of a reward is a string; given {name!r}")
    for key in ("weight", "floor", "below", "cap"):
        if key in settings and (isinstance(settings[key], bool) or not isinstance(settings[key], int | float)):
            raise RlhfImgError(f"reward {name}: {key} is a number; given {settings[key]!r}")
    if settings.get("role", "objective") not in (roles := ("objective", "gate", "both", "measure")):
        raise RlhfImgError(f"reward {name}: role is one of {', '.join(roles)}; given {settings['role']!r}")
    for key in ("group", "waits"):
        if not isinstance(settings.get(key, False), bool):
            raise RlhfImgError(f"reward {name}: {key} is true or false; given {settings[key]!r}")


def _range(given: Any, name: str) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        raise RlhfImgError(f"reward {name}: range is (lowest, highest), such as [0, 1]; given {given!r}") from None
    return low, high


def _bind(fn: Any, options: Mapping[str, Any], name: str) -> Any:
    """The function with its options filled in; only parameters it names can be options."""
    if not options:
        return fn
    parameters = inspect.signature(fn).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            raise RlhfImgError(f'reward {name} has no option "{key}"; {did_you_mean(str(key), known)}')
    return functools.partial(fn, **options)


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist is not None else f"module {point.value}"


def _where(error: Exception) -> str:
    """An import's failure and the line of it, for the author of the plug-in."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
