"""Named facts, perhaps nested, as a table of two columns on the terminal."""

from collections.abc import Mapping
from typing import Any


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Prints the table; underscores of names become spaces."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), escape(_text(value)))
    Console().print(table)


def _text(value: Any) -> str:
    match value:
        case dict():
            return "\n".join(f"{key}: {_text(inner)}" for key, inner in value.items()) or "none"
        case list():
            return "\n".join(value) or "none yet"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "unknown" if value is None else str(value)
