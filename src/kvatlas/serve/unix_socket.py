"""A Unix socket to listen on: taken only where nothing else listens, for its owner alone, and gone afterwards."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvatlas.errors import ConfigError

PATH_BYTES_MAX = 107
"""Of a Unix socket's address on Linux."""

CONNECT_S = 1.0


def socket_path(address: str) -> Path | None:
    """Return the path of ``unix:///path`` or ``unix:path``; None for an address that is no Unix socket. Raises ConfigError."""
    if not address.startswith("unix:"):
        return None
    path = address.removeprefix("unix://") if address.startswith("unix://") else address.removeprefix("unix:")
    if not path or len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigError("--listen", f"{address!r} has no usable path", f"unix:///PATH of at most {PATH_BYTES_MAX} bytes")
    return Path(path)


def clear_stale(path: Path) -> None:
    """Remove the socket that a service left behind. Raises ConfigError where something listens there, or it is no socket.

    gRPC would remove whatever socket is there, also one that is in use.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, f"cannot look at it: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise _unusable(path, "there is something that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unusable(path, f"cannot tell whether something listens there: {error.strerror or error}") from None
        else:
            raise _unusable(path, "another service listens there")


@contextmanager
def only_for(mode: int) -> Iterator[None]:
    """Let files be made for ``mode`` (such as 0o600) at most while the block lasts. In all threads: use it at start."""
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells this file from one that takes its place later."""
    found = path.lstat()
    return found.st_dev, found.st_ino


def remove(path: Path, made: tuple[int, int]) -> None:
    """Remove a socket, unless another has taken its place."""
    try:
        if identity(path) == made:
            path.unlink()
    except FileNotFoundError:
        pass


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError("--listen", f"cannot listen on {path}: {problem}", "a path of its own, in a directory that is there")
