"""Rubric files: YAML in and out, and every error with its line, its column and how to mend it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.rubrics.schema import Aggregate, Gate, Requirement, Rubric, Source, graph_problems

Location = tuple[int | str, ...]
_BOOL, _INT, _STAMP = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "timestamp"))


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Finding:
    """Something to mend in a rubric file. `line` and `column` count from 1."""

    line: int
    column: int
    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.severity}: {self.message}"


def load_rubrics(path: str | Path) -> list[Rubric]:
    """The rubrics of a YAML file, which holds one or a list.

    Raises RlhfImgError, with file, line and column, if it is not readable, not YAML or not a valid rubric.
    """
    return parse_rubrics(read_text(path), where=str(path))


def read_text(path: str | Path) -> str:
    """The text of a file. Raises RlhfImgError if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RlhfImgError(f"{path}: cannot be read as text: {error}") from error


def parse_rubrics(text: str, where: str = "rubric") -> list[Rubric]:
    """As `load_rubrics`, of text; `where` names it in errors."""
    rubrics, problems = read_rubrics(text)
    if problems:
        raise RlhfImgError("\n".join(f"{where}:{problem}" for problem in problems))
    return [rubric for rubric, _ in rubrics]


def read_rubrics(text: str) -> tuple[list[tuple[Rubric, yaml.Node]], list[Finding]]:
    """The valid rubrics of a file with the part of the YAML tree each comes from, and all errors, in their order."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        return [], [_syntax_error(error)]
    if node is None:
        message = "empty; expected a rubric (prompt, requirements) or a list of them"
        return [], [Finding(line=1, column=1, severity="error", message=message)]
    items = zip(data, node.value, strict=True) if isinstance(data, list) else [(data, node)]
    rubrics, problems = [], list(_traps(node))
    for item, item_node in items:
        graph = [
            finding(item_node, ("requirements", i, field), "error", message)
            for i, field, message in graph_problems(_rows(item))
        ]
        problems += graph
        try:
            rubrics.append((Rubric.model_validate(item), item_node))
        except ValidationError as error:
            for e in error.errors():
                if graph and not e["loc"]:
                    continue  # said above, with its place
                key = e["type"] == "extra_forbidden"
                problems.append(finding(item_node, e["loc"], "error", _explain(e, item), at_key=key))
    # a trap says more than the type error that follows from it
    first = {(p.line, p.column): p for p in reversed(problems)}
    return rubrics, sorted(first.values())


def _rows(item: object) -> list[tuple[str, tuple[str, ...]]]:
    """Id and needs of each requirement of a rubric that may hold anything; nothing where one has no id."""
    requirements = item.get("requirements") if isinstance(item, dict) else None
    if not isinstance(requirements, list) or not all(isinstance(r, dict) and "id" in r for r in requirements):
        return []
    needs = [r.get("needs") if isinstance(r.get("needs"), list) else [] for r in requirements]
    return [(str(r["id"]), tuple(map(str, of))) for r, of in zip(requirements, needs, strict=True)]


def finding(
    node: yaml.Node, location: Sequence[int | str], severity: Literal["error", "warning"], message: str, *,
    at_key: bool = False,
) -> Finding:  # fmt: skip
    """A finding at the deepest part of `location` (keys and places in lists) that the YAML tree has."""
    mark = node.start_mark
    for step in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            mark = node.start_mark
        elif isinstance(node, yaml.MappingNode):
            children = {key.value: (key, value) for key, value in node.value}
            if step not in children:
                break
            key, node = children[str(step)]
            mark = key.start_mark if at_key else node.start_mark
    return Finding(line=mark.line + 1, column=mark.column + 1, severity=severity, message=message)


def _syntax_error(error: yaml.YAMLError) -> Finding:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message = f"not valid YAML: {problem}. A value with a colon, comma, question mark, bracket or # wants quotes"
    return Finding(line=line, column=column, severity="error", message=message)


def _traps(node: yaml.Node) -> Iterator[Finding]:
    """What YAML reads otherwise than it was meant, or drops without a word."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _traps(child)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield finding(key, (), "error", f"{key.value} is given twice here, and YAML keeps only the last")
            seen.add(str(key.value))
            yield from _traps(key)
            yield from _traps(value)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        means = {_BOOL: "a boolean", _INT: "another number", _STAMP: "a date"}.get(node.tag)
        if means and not re.fullmatch(r"true|false|0|-?[1-9][0-9]*", node.value):
            yield finding(node, (), "error", f'YAML reads the bare {node.value} as {means}: quote it, "{node.value}"'
                          + (", or write true or false" if node.tag == _BOOL else ""))  # fmt: skip


def _explain(error: object, item: object) -> str:
    assert isinstance(error, dict)
    location, message = error["loc"], str(error["msg"]).removeprefix("Value error, ")
    path = ".".join(str(step) for step in location)
    if not isinstance(item, dict):
        return f"expected a rubric (a mapping with prompt and requirements), got {type(item).__name__}"
    if error["type"] == "extra_forbidden":
        known = [field.serialization_alias or name for name, field in _model_at(location).model_fields.items()]
        return f"{path}: unknown field {location[-1]!r}; {did_you_mean(str(location[-1]), known)}"
    given = f" (got {error['input']!r})" if error["type"] not in ("value_error", "missing", "invalid_key") else ""
    return f"{path}: {message}{given}" if path else f"{message}"


def _model_at(location: Location) -> type[BaseModel]:
    models: dict[str, type[BaseModel]] = {
        "requirements": Requirement,
        "aggregate": Aggregate,
        "gates": Gate,
        "source": Source,
    }
    return models.get(str(location[0]), Rubric) if len(location) > 1 else Rubric


class _Row(dict[str, object]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Row, lambda dumper, row: dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)
)


def dump_rubrics(rubrics: Sequence[Rubric]) -> str:
    """YAML that `parse_rubrics` reads back to equal rubrics, a requirement a line; defaults are not written."""
    plain = [_plain(r) for r in rubrics]
    data = plain[0] if len(plain) == 1 else plain
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _plain(rubric: Rubric) -> dict[str, object]:
    plain = rubric.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    rows: dict[str, object] = {"requirements": [_Row(r) for r in plain.get("requirements", [])]}
    rows |= {name: _Row(plain[name]) for name in ("aggregate", "source") if name in plain}
    rows |= {"gates": [_Row(g) for g in plain["gates"]]} if "gates" in plain else {}
    return {"version": rubric.version, **plain, **rows}
