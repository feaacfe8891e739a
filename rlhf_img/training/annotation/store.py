"""The answers: who is asked about which pair, and what was said. Each is on the disk before it is confirmed.

A pair that is wanted from two people has two tasks. A task belongs to whoever took it until it is done or its time is
up, so that nobody else is asked the same meanwhile. One person's answer to a pair is kept once, however often it comes.
"""

import time
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from rlhf_img.errors import RlhfImgError
from rlhf_img.training.annotation.databases import create, open_database

Choice = Literal["0", "1", "tie", "skip"]
"""The number of the image that is preferred, or that none is, or that this person would rather not say."""

LEASE_S = 900.0
"""Seconds for which a pair is kept for whoever has it on the screen."""

_TABLES = (
    """CREATE TABLE IF NOT EXISTS tasks (
        batch TEXT NOT NULL, pair TEXT NOT NULL, slot INTEGER NOT NULL, place INTEGER NOT NULL, holder TEXT,
        until DOUBLE PRECISION, done INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (batch, pair, slot))""",
    """CREATE TABLE IF NOT EXISTS labels (
        pair TEXT NOT NULL, annotator TEXT NOT NULL, choice TEXT NOT NULL, left_image INTEGER NOT NULL,
        seconds DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL, PRIMARY KEY (pair, annotator))""",
)
_MINE_FIRST = "CASE WHEN holder = :annotator THEN 0 ELSE 1 END"
_OURS = "pair IN (SELECT pair FROM tasks WHERE batch = :batch)"


class Label(NamedTuple):
    """One person's answer to one pair."""

    pair: str
    annotator: str
    choice: Choice
    left_image: int
    """The number of the image that was shown on the left."""
    seconds: float
    """How long it took."""


class Progress(NamedTuple):
    """Of all tasks, those done; and one person's answers."""

    done: int
    total: int
    mine: int


class Store:
    """Answers about one batch of pairs in a database; any number of processes may use it at a time."""

    def __init__(self, where: str, batch: str) -> None:
        """`where`: a SQLite file, or the URL of a PostgreSQL database. Raises RlhfImgError if it cannot be used."""
        self._database, self._batch = open_database(where), batch
        create(self._database, _TABLES)

    def add(self, wanted: Mapping[str, int]) -> None:
        """Pairs to be judged, and by how many people each; what is there already stays as it is."""
        with self._database.transaction() as execute:
            for place, (pair, people) in enumerate(wanted.items()):
                for slot in range(people):
                    execute(
                        """INSERT INTO tasks (batch, pair, slot, place) VALUES (:batch, :pair, :slot, :place)
                           ON CONFLICT DO NOTHING""",
                        {"batch": self._batch, "pair": pair, "slot": slot, "place": place},
                    )

    def take(self, annotator: str) -> str | None:
        """The next pair for this person, kept for them a while; None if nothing is left for them now.

        Whoever has a pair already gets the same again, as after a reload.
        """
        now = time.time()
        with self._database.transaction() as execute:
            found = execute(
                f"""SELECT pair, slot FROM tasks
                    WHERE batch = :batch AND done = 0 AND (holder IS NULL OR holder = :annotator OR until < :now)
                      AND NOT EXISTS (SELECT 1 FROM labels
                                      WHERE labels.pair = tasks.pair AND labels.annotator = :annotator)
                    ORDER BY {_MINE_FIRST}, slot, place LIMIT 1 {self._database.lock}""",
                {"batch": self._batch, "annotator": annotator, "now": now},
            ).rows
            if not found:
                return None
            pair, slot = found[0]
            execute(
                """UPDATE tasks SET holder = :annotator, until = :until
                   WHERE batch = :batch AND pair = :pair AND slot = :slot""",
                {"batch": self._batch, "annotator": annotator, "until": now + LEASE_S, "pair": pair, "slot": slot},
            )
        return str(pair)

    def record(self, label: Label) -> bool:
        """Keeps an answer; False if this person has answered this pair before, and then nothing changes.

        Raises RlhfImgError for an answer that is none, or a pair that nobody asked about.
        """
        if label.choice not in get_args(Choice):
            raise RlhfImgError(f'"{label.choice}" is no answer; expected one of {", ".join(get_args(Choice))}')
        task = {"batch": self._batch, "pair": label.pair, "annotator": label.annotator}
        with self._database.transaction() as execute:
            if not execute("SELECT 1 FROM tasks WHERE batch = :batch AND pair = :pair", task).rows:
                raise RlhfImgError(f'there is no pair "{label.pair}" to judge')
            new = execute(
                """INSERT INTO labels (pair, annotator, choice, left_image, seconds, at)
                   VALUES (:pair, :annotator, :choice, :left_image, :seconds, :at) ON CONFLICT DO NOTHING""",
                {**label._asdict(), "at": time.time()},
            ).written
            if new:
                # Skipped: somebody else may be asked.
                holder, done = ("NULL", 0) if label.choice == "skip" else (":annotator", 1)
                execute(
                    f"UPDATE tasks SET done = {done}, holder = {holder} "
                    "WHERE batch = :batch AND pair = :pair AND holder = :annotator AND done = 0", task,
                )  # fmt: skip
        return new > 0

    def progress(self, annotator: str) -> Progress:
        """How far the batch is, and this person's part."""
        who = {"batch": self._batch, "annotator": annotator}
        with self._database.transaction() as execute:
            [(total, done)] = execute("SELECT COUNT(*), SUM(done) FROM tasks WHERE batch = :batch", who).rows
            [(mine,)] = execute(f"SELECT COUNT(*) FROM labels WHERE annotator = :annotator AND {_OURS}", who).rows
        return Progress(done=int(done or 0), total=int(total), mine=int(mine))

    def labels(self) -> list[Label]:
        """Every answer about the batch, in the order they came."""
        columns = ", ".join(Label._fields)
        with self._database.transaction() as execute:
            rows = execute(f"SELECT {columns} FROM labels WHERE {_OURS} ORDER BY at, pair", {"batch": self._batch}).rows
        return [Label(*row) for row in rows]
