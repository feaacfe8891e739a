"""The two databases that answers are kept in: SQLite, which is always there, and PostgreSQL for several machines."""

import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rlhf_img.errors import RlhfImgError

POSTGRES = ("postgresql://", "postgres://")


class StoreFailed(RlhfImgError):
    """The database cannot be reached or written now; it may come back."""


class Result(NamedTuple):
    """What a statement gave back, and how many rows it wrote."""

    rows: list[tuple[Any, ...]]
    written: int


Execute = Callable[[str, Mapping[str, object]], Result]
"""A statement with `:name` for each value."""


@runtime_checkable
class Database(Protocol):
    """Statements in transactions; once a transaction has ended, what it wrote is on the disk."""

    @property
    def lock(self) -> str:
        """What follows a SELECT so that a row goes to one transaction alone."""

    def transaction(self) -> AbstractContextManager[Execute]:
        """All of its statements count, or, after an exception, none."""


class SQLite:
    """A file. One transaction at a time, so that rows need no locks."""

    lock = ""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        try:
            with closing(sqlite3.connect(self._file, timeout=30, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")  # an answer outlives a power cut

                def execute(statement: str, values: Mapping[str, object]) -> Result:
                    cursor = connection.execute(statement, dict(values))
                    return Result(cursor.fetchall(), cursor.rowcount)

                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield execute
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreFailed(f"answers cannot be kept in {self._file}: {error}; give another --store") from error


class Postgres:
    """A server, by its URL. Several transactions at a time: a row that one looks at is passed over by the others."""

    lock = "FOR UPDATE SKIP LOCKED"

    def __init__(self, url: str) -> None:
        """Raises RlhfImgError if the driver is not installed."""
        try:
            import psycopg
        except ImportError as error:
            raise RlhfImgError(
                f"a PostgreSQL store needs its driver ({error}): pip install 'rlhf-img[postgres]'"
            ) from error
        self._psycopg, self._url = psycopg, url

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        try:
            with self._psycopg.connect(self._url, connect_timeout=10) as connection:

                def execute(statement: str, values: Mapping[str, object]) -> Result:
                    cursor = connection.execute(re.sub(r":(\w+)", r"%(\1)s", statement), dict(values))
                    return Result([] if cursor.description is None else cursor.fetchall(), cursor.rowcount)

                yield execute
        except self._psycopg.Error as error:
            # Not the URL itself: it may hold a password.
            raise StoreFailed(
                f"the PostgreSQL store failed: {error}; see that --store is right and the server up"
            ) from error


def open_database(store: str) -> Database:
    """The database of a file's path or a PostgreSQL URL. Raises RlhfImgError if its folder or driver is missing."""
    if store.startswith(POSTGRES):
        return Postgres(store)
    if "://" in store:
        raise RlhfImgError(f'"{store}" is no store: give a file, or a URL that begins with {POSTGRES[0]}')
    file = Path(store)
    if not file.parent.is_dir():
        raise RlhfImgError(f"{file.parent} is no folder: give another --store")
    return SQLite(file)


def create(database: Database, statements: Sequence[str]) -> None:
    """Makes tables that are not there yet."""
    with database.transaction() as execute:
        for statement in statements:
            execute(statement, {})
