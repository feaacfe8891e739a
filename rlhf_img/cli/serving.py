"""How the small web servers of this package are started: where they listen, for whom, and how they end."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf_img.errors import RlhfImgError

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hosts_of(host: str) -> tuple[str, ...]:
    """The names under which a server that listens on `host` may be reached."""
    return tuple(f"[{name}]" if ":" in name else name for name in LOOPBACK) if host in LOOPBACK else ("*",)


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket that a server can answer on, and its address; port 0 is any free one. Raises RlhfImgError if taken."""
    try:
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RlhfImgError(f"cannot listen on {host}, port {port}: {error.strerror}; give another --port") from error
    with bound:
        yield bound, f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


def run(app: "Starlette", bound: socket.socket) -> None:
    """Answers until Ctrl-C or SIGTERM, and then ends what it has begun, within 30 seconds."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[bound])
