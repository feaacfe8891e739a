"""A PostgreSQL server of a test's own, where its programs are installed."""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of an empty database, on a socket in `folder`, which must lie where every user may go.

    Skips the test where there is no server or no driver.
    """
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'rlhf-img[postgres]'")
    found = [Path(p) for p in (shutil.which("initdb"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))) if p]
    if not found:
        pytest.skip("no PostgreSQL server is installed here (initdb is not found)")
    programs = found[0].resolve().parent
    # It refuses to run as root.
    user = {"user": "postgres" if _exists("postgres") else "nobody"} if os.geteuid() == 0 else {}
    folder.mkdir(parents=True)
    if user:
        shutil.chown(folder, **user)

    def call(program: str, *words: str) -> None:
        done = subprocess.run([programs / program, *words], capture_output=True, text=True, cwd=folder, **user)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr

    data = str(folder / "data")
    call("initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync")
    log = str(folder / "log")
    call("pg_ctl", "-D", data, "-w", "-l", log, "-o", f"-k {folder} -c listen_addresses='' -F", "start")
    try:
        yield f"postgresql://tester@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
