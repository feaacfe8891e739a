"""Strict configs: frozen dataclasses from YAML and `key=value`; an unknown key is an error that names the nearest."""

import ast
import dataclasses
import importlib.metadata
import inspect
import os
import platform
import shutil
import subprocess
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf_img.errors import RlhfImgError, did_you_mean

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """A config of the dataclass `cls` from a (nested) mapping, with every value checked against its annotation.

    Fields may be int, float, str, bool, Literal, tuples and unions of these, None, dicts and nested dataclasses. An int
    stands for a float, and so does text that reads as a number, because YAML takes `1e-3` for text.

    Raises RlhfImgError, prefixed with `where` (such as "grpo"): unknown or missing key, wrong type, or a value that the
    dataclass's own `__post_init__` refuses with a ValueError.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise RlhfImgError(f'{where}: unknown key "{key}": {did_you_mean(str(key), fields)}')
    missing = [name for name, f in fields.items() if name not in mapping and _is_required(f)]
    if missing:
        raise RlhfImgError(f"{where}: missing {', '.join(missing)}")
    hints = get_type_hints(cls)
    values = {key: _coerce(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise RlhfImgError(f"{where}: {error}") from error


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Command-line settings as a nested mapping.

    >>> parse_overrides(["lr=1e-3", "lora.rank=8", "rewards=[rubric, artifact]"])
    {'lr': '1e-3', 'lora': {'rank': 8}, 'rewards': ['rubric', 'artifact']}
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RlhfImgError(f'"{pair}" is not a setting: expected key=value, such as lr=1e-3 or lora.rank=8')
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RlhfImgError(f"{pair!r}: the value is not YAML; put it in quotes: {key}='\"...\"'") from error
        for part in reversed(parts):
            value = {part: value}
        result = merge(result, value)
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their places; mappings merge, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RlhfImgError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RlhfImgError(f"{path}: cannot be read: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RlhfImgError(f"{path}: expected `key: value` lines at the top, got a {type(content).__name__}")
    return content


def to_mapping(config: object) -> dict[str, Any]:
    """A config as nested dicts, lists and plain values, such as YAML can hold; `from_mapping` reads it back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}  # type: ignore[arg-type]


class FieldDoc(NamedTuple):
    """One setting, for `--help`."""

    key: str
    """Dotted, such as `lora.rank`."""
    type: str
    default: str
    doc: str


def describe(cls: type) -> list[FieldDoc]:
    """Every setting of a config class, nested ones with dotted keys, with the text literal written under its field."""
    hints, docs = get_type_hints(cls), _field_docs(cls)
    result: list[FieldDoc] = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            result += [inner._replace(key=f"{field.name}.{inner.key}") for inner in describe(hint)]
        else:
            result.append(FieldDoc(field.name, _type_name(hint), _default_text(field), docs.get(field.name, "")))
    return result


def versions() -> dict[str, str]:
    """What a run was made with: our version and git revision, Python, the packages that matter, the machine."""
    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scikit-image", "pillow")
    result = {"rlhf-img": _package_version("rlhf-img"), "git": _git_revision(), "python": platform.python_version()}
    result |= {name: _package_version(name) for name in names}
    return result | {"platform": platform.platform(), "hardware": _hardware()}


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or an error that says what was expected."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise RlhfImgError(f"{where}: expected keys with values, got {value!r}")
        return from_mapping(hint, value, where)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if origin is tuple:
        return _coerce_tuple(hint, value, where)
    if origin is dict:  # free keys, which their reader checks
        if not isinstance(value, Mapping):
            raise RlhfImgError(f"{where}: expected keys with values, got {value!r}")
        return dict(value)
    if origin is Literal:
        options = get_args(hint)
        # `1 == True` in Python, so the type is compared too.
        if any(value == option and type(value) is type(option) for option in options):
            return value
        known = f"; {did_you_mean(value, map(str, options))}" if isinstance(value, str) else ""
        raise RlhfImgError(f"{where}: expected one of {', '.join(map(str, options))}, got {value!r}{known}")
    return _coerce_scalar(hint, value, where)


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    elif hint is type(None) and value is None:
        return None
    elif hint not in (float, int, bool, str, type(None)):
        raise TypeError(f"{where}: a config cannot hold fields of type {hint}")
    raise RlhfImgError(f"{where}: expected {_type_name(hint)}, got {value!r}")


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    """The first member that takes the value as it is; text becomes a number only where no member is text."""
    members = get_args(hint)
    if value is None and type(None) in members:
        return None
    exact = [m for m in members if m is type(value)]
    errors = []
    for member in exact or [m for m in members if m is not type(None)]:
        try:
            return _coerce(member, value, where)
        except RlhfImgError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise RlhfImgError(f"{where}: expected {_type_name(hint)}, got {value!r}")


def _coerce_tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    members = get_args(hint)
    if not isinstance(value, list | tuple):
        raise RlhfImgError(f"{where}: expected a list such as [a, b], got {value!r}")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise RlhfImgError(f"{where}: expected {len(members)} values, got {len(value)}: {list(value)!r}")
    return tuple(_coerce(m, v, f"{where}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_type_name(member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return "list of " + " and ".join(dict.fromkeys(_type_name(m) for m in get_args(hint) if m is not Ellipsis))
    names = {type(None): "null", bool: "true or false", str: "text", float: "number", int: "whole number"}
    return names.get(hint, str(hint))


def _default_text(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return str(_plain(field.default_factory()))
    return "required" if field.default is dataclasses.MISSING else yaml_text(_plain(field.default))


def yaml_text(value: Any) -> str:
    """A plain value on one line, as YAML writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _field_docs(cls: type) -> dict[str, str]:
    """The text literals that stand under fields; they are not kept at run time, so they are read from the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docs[field.target.id] = " ".join(text.split())
    return docs


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    """The commit of our checkout, with "+changes" if files differ from it."""
    root = Path(__file__).resolve().parent.parent
    # A virtual environment may lie inside a stranger's repository, whose revision says nothing of ours.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "not a checkout"
    revision = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return (revision or "no commit") + ("+changes" if changes else "")


def _hardware() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    parts = [f"{os.cpu_count()} x {cpu}", *sorted({f"{gpus.count(gpu)} x {gpu}" for gpu in gpus})]
    return ", ".join(parts)


def _output(*command: str) -> str:
    """What a command prints, or "" where it is missing or fails: it only describes the machine."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
