"""Functions and commands as the processes of one run, forked from a server that has imported everything already."""

import multiprocessing
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "rlhf_img.cli.main", "rlhf_img.training.grpo", "rlhf_img.training.nft", "rlhf_img.training.dpo",
    "rlhf_img.training.tdm", "rlhf_img.report", "tiny",
])  # fmt: skip
PATIENCE = 300
"""Seconds; a busy machine is slow."""


def start(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[ForkServerProcess]:
    """`count` processes that call `function`, which leave their results and what they say in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = (count, port, folder, function, args)
    running = [_CONTEXT.Process(target=_work, args=(rank, *common)) for rank in range(count)]
    for process in running:
        process.start()
    return running


def together(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function` gives in each of `count` processes, by rank."""
    running = start(count, folder, function, *args)
    try:
        wait(running)
    finally:
        for process in running:
            process.kill()
    failed = [rank for rank, process in enumerate(running) if process.exitcode]
    assert not failed, "\n".join(said(folder, rank) for rank in failed)
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(count)]


def wait(running: Sequence[ForkServerProcess]) -> None:
    """Until all are done or one has failed."""
    deadline = time.monotonic() + PATIENCE
    while any(process.exitcode is None for process in running) and not any(process.exitcode for process in running):
        assert time.monotonic() < deadline, "the processes wait for each other"
        time.sleep(0.02)


def said(folder: Path, rank: int) -> str:
    """What a process printed."""
    return (folder / f"said-{rank}").read_text()


def command(words: Sequence[str]) -> int:
    """The command line in this process; its exit code."""
    from rlhf_img.cli.main import main

    sys.argv = ["rlhf-img", *words]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def _work(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], args: Sequence[Any]) -> None:
    output = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("error")
    torch.save(function(*args), folder / f"result-{rank}")
