"""One command as several processes on this machine."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

_SAME = 5.0
"""Seconds that the first process has to fail as another did."""


def started() -> bool:
    """Whether this is one of several processes already, of ours, torchrun's or accelerate's."""
    return "WORLD_SIZE" in os.environ


def launch(count: int) -> None:
    """Ends with what this very command gives as `count` processes; of one process, nothing happens.

    If one fails the others are stopped, and the exit code is that of the one that failed first.
    """
    if count > 1:
        sys.exit(_run(count))


def _run(count: int) -> int:
    cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": str(max(1, cores // count))}
    # Huge pages for what glibc allocates: a small model's steps on a CPU are faster, see docs/performance.md.
    common |= {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the others are stopped too
    running: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]  # by all but the first
        try:
            for rank, out in enumerate([None, *said]):
                environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen(
                    [sys.executable, "-m", "rlhf_img.cli.main", *sys.argv[1:]], env=environment, stdout=out, stderr=out,
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                ))  # fmt: skip
            failed = _wait(running)
            if failed and running[failed].returncode > 1:  # the first may be about to say the same
                with suppress(subprocess.TimeoutExpired):
                    running[0].wait(_SAME)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
        # What is wrong for all of them (exit code 2 or 3) is said once.
        if failed and not running[0].returncode == running[failed].returncode > 1:
            said[failed - 1].seek(0)
            sys.stderr.buffer.write(said[failed - 1].read())
    if failed is None:
        return 0
    code = running[failed].returncode
    if code < 0:  # it could not say so itself
        print(
            f"error: process {failed} of {count} was killed by {signal.Signals(-code).name} (out of memory?), and the "
            "others were stopped. What the last checkpoint holds is safe; go on with --resume",
            file=sys.stderr,
        )
    return _exit_code(code)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <sys/prctl.h>


def _wait(running: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    """The rank that failed first, or None once all are done."""
    while True:
        codes = [process.poll() for process in running]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return min(failed, key=lambda rank: (codes[rank] or 0) > 0)  # who misses one that was killed fails next
        if None not in codes:
            return None
        time.sleep(0.1)


def _exit_code(code: int) -> int:
    return code if code > 0 else 128 - code  # killed by a signal: as a shell says it
