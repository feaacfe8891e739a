"""The pool's file: prompts with what is known of them, in SQLite.

A run works on a copy that is made when it begins (`copy_to`), so that the prompts it draws from do not change under it,
and its own statistics are part of its checkpoints. After each checkpoint the groups up to it are added to the file that
the copy was made of (`publish`): never ahead of a checkpoint, or a run that is killed and resumed would count the
groups between twice; and each once, because the file notes how far each run has been added. Several runs may
share a file.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_img.errors import RlhfImgError
from rlhf_img.training.pool.normal import normal_form
from rlhf_img.training.pool.weights import Group, Statistics

SUFFIX = ".sqlite"
"""By this a path is known to be a pool."""
_APPLICATION = 0x524C4850
"""SQLite's mark of whose file it is."""
_VERSION = 1
_PATIENCE_S = 30.0
"""How long a transaction waits for another process's."""
_SCHEMA = (
    """CREATE TABLE prompts (
        id INTEGER PRIMARY KEY, text TEXT NOT NULL, normal TEXT NOT NULL UNIQUE, rubric TEXT,
        source TEXT NOT NULL, cluster INTEGER NOT NULL DEFAULT 0, retired TEXT,
        groups INTEGER NOT NULL DEFAULT 0, score REAL, variance REAL NOT NULL DEFAULT 0,
        flat INTEGER NOT NULL DEFAULT 0, last INTEGER NOT NULL DEFAULT 0)""",
    "CREATE TABLE runs (run TEXT PRIMARY KEY, step INTEGER NOT NULL)",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value)",
    "INSERT INTO facts VALUES ('clock', 0)",
)
_COLUMNS = "groups, score, variance, flat, last"


@dataclass(frozen=True, slots=True)
class Entry:
    """A prompt of the pool. rubric: its own, as YAML. retired: why it is no longer drawn, or None."""

    id: int
    text: str
    rubric: str | None
    source: str
    cluster: int
    retired: str | None


Observed = tuple[int, int, Group]
"""An iteration of a run, the id of a prompt that it drew, and what the group has shown."""


class PoolFile:
    """A prompt pool on the disk. Everything raises RlhfImgError if the file cannot be used."""

    def __init__(self, path: Path) -> None:
        """Opens a pool that exists; see `create`."""
        if not path.is_file():
            raise RlhfImgError(f"there is no prompt pool {path}; make one: rlhf-img prompts add {path} prompts.txt")
        self.path = path
        with self._reading():
            pass

    @classmethod
    def create(cls, path: Path) -> "PoolFile":
        """Opens a pool, and makes an empty one first if there is none."""
        if not path.parent.is_dir():
            raise RlhfImgError(f"{path.parent} is no folder: make it, or give another path for the pool")
        with _explained(path), closing(_connect(path)) as connection, _transaction(connection, "IMMEDIATE"):
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        return cls(path)

    def add(self, prompts: Iterable[tuple[str, str | None]], source: str) -> tuple[int, int]:
        """Adds (text, rubric as YAML or None), all or none. What is there, perhaps spelt otherwise, stays, and gets the
        rubric if it has none.

        Returns how many were added and how many were there.
        """
        rows = [(text, normal_form(text), rubric, source) for text, rubric in prompts]
        with self._writing() as connection:
            (before,) = connection.execute("SELECT count(*) FROM prompts").fetchone()
            connection.executemany(
                "INSERT INTO prompts (text, normal, rubric, source) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (normal) DO UPDATE SET rubric = coalesce(rubric, excluded.rubric)", rows,
            )  # fmt: skip
            (after,) = connection.execute("SELECT count(*) FROM prompts").fetchone()
        return after - before, len(rows) - (after - before)

    def entries(self, *, retired: bool = False) -> list[Entry]:
        """Its prompts in the order in which they came, with `retired` also those that are."""
        where = "" if retired else "WHERE retired IS NULL"
        with self._reading() as connection:
            columns = "id, text, rubric, source, cluster, retired"
            rows = connection.execute(f"SELECT {columns} FROM prompts {where} ORDER BY id")
            return [Entry(*row) for row in rows]

    def statistics(self, ids: Sequence[int]) -> Statistics:
        """What is known of some of its prompts, in the order of `ids`."""
        with self._reading() as connection:
            return _statistics(connection, ids)

    @property
    def clock(self) -> int:
        """Iterations of all runs that were published."""
        return int(self._fact("clock"))

    @property
    def origin(self) -> Path | None:
        """The pool that this is a run's copy of."""
        found = self._fact("origin")
        return Path(found) if found else None

    def _fact(self, name: str) -> Any:
        with self._reading() as connection:
            row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def retire(self, reasons: Mapping[int, str | None]) -> None:
        """Takes prompts, by id, out of what runs draw from, for a reason; None brings one back."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE prompts SET retired = ? WHERE id = ?", [(reason, id) for id, reason in reasons.items()]
            )

    def set_clusters(self, clusters: Mapping[int, int]) -> None:
        """Notes the cluster of prompts, by id."""
        with self._writing() as connection:
            connection.executemany("UPDATE prompts SET cluster = ? WHERE id = ?", [(c, i) for i, c in clusters.items()])

    def copy_to(self, target: Path) -> None:
        """A copy, whole or not at all, that knows where it comes from (fact "origin")."""
        hidden = target.with_name(f".partial-{target.name}")
        with _explained(target):
            hidden.unlink(missing_ok=True)
            with self._reading() as connection:
                connection.execute("VACUUM INTO ?", (str(hidden),))
            with closing(_connect(hidden)) as copy, _transaction(copy, "IMMEDIATE"):
                copy.execute("INSERT OR REPLACE INTO facts VALUES ('origin', ?)", (str(self.path.resolve()),))
            with open(hidden, "rb") as written:
                os.fsync(written.fileno())
            os.replace(hidden, target)

    def publish(self, run: str, step: int, observed: Sequence[Observed]) -> None:
        """Adds what the groups of a run have shown up to its iteration `step`. What was added before is passed over."""
        with self._writing() as connection:
            row = connection.execute("SELECT step FROM runs WHERE run = ?", (run,)).fetchone()
            done = row[0] if row else 0
            if step <= done:
                return
            (clock,) = connection.execute("SELECT value FROM facts WHERE name = 'clock'").fetchone()
            base = clock - done
            new = [item for item in observed if item[0] > done]
            ids = sorted({id for _, id, _ in new})
            known, rows = _statistics(connection, ids), {id: row for row, id in enumerate(ids)}
            for at, id, group in new:
                known.record(rows[id], group, base + at)
            columns = (known.groups_N, known.score_N, known.variance_N, known.flat_N, known.last_N)
            values = zip(*(column.tolist() for column in columns), ids, strict=True)
            # SQLite makes NULL of NaN.
            connection.executemany(
                "UPDATE prompts SET groups = ?, score = ?, variance = ?, flat = ?, last = ? WHERE id = ?", values
            )
            connection.execute("UPDATE facts SET value = ? WHERE name = 'clock'", (base + step,))
            connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (run, step))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path), closing(_connect(self.path)) as connection:
            _check(connection, self.path)
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as connection, _transaction(connection, "IMMEDIATE"):
            yield connection


def _statistics(connection: sqlite3.Connection, ids: Sequence[int]) -> Statistics:
    rows = {id: row for id, *row in connection.execute(f"SELECT id, {_COLUMNS} FROM prompts")}
    if missing := [id for id in ids if id not in rows]:
        raise RlhfImgError(f"the pool has no prompt of number {missing[0]} any more; was it made anew?")
    wanted = [rows[id] for id in ids]
    groups, score, variance, flat, last = zip(*wanted, strict=True) if wanted else ((),) * 5
    return Statistics(
        np.array(groups, np.int64), np.array(score, np.float64), np.array(variance, np.float64),
        np.array(flat, np.int64), np.array(last, np.int64),
    )  # fmt: skip


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None)


def _check(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != _APPLICATION:
        raise RlhfImgError(f"{path} is an SQLite file, but no prompt pool; give another path, or move it away")
    if version != _VERSION:
        raise RlhfImgError(f"{path} is a prompt pool of version {version}, and this rlhf-img reads version {_VERSION}: "
                           "use the rlhf-img that made it, or make the pool anew from its prompts")


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        advice = {
            sqlite3.SQLITE_NOTADB: "it is no SQLite file; give a prompt pool, or move it away",
            sqlite3.SQLITE_CORRUPT: "it is damaged; restore a copy, such as a run's prompts.sqlite, or make it anew",
            sqlite3.SQLITE_BUSY: "another process is writing to it; try again when it is done",
            sqlite3.SQLITE_FULL: "make room on the disk; nothing was changed",
        }.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "nothing was changed")
        raise RlhfImgError(f"the prompt pool {path} cannot be used ({error}): {advice}") from error
    except OSError as error:
        raise RlhfImgError(f"the prompt pool {path} cannot be written: {error.strerror or error}") from error
