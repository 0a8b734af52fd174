"""Ports that nobody has: for servers that have to be told their port before they listen."""

from __future__ import annotations

import os
import socket
from itertools import cycle, islice

FIRST = 20_000
"""Below those that kernels give to connections (32,768 on Linux), which could take one before its server does."""
A_PROCESS = 1_500
STEP = 10
"""Some servers take the ports behind theirs too."""

_first = FIRST + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8 * A_PROCESS
_ports = cycle(range(_first + os.getpid() % STEP, _first + A_PROCESS - STEP, STEP))


def free_port() -> int:
    """Return a port of this machine's loopback that is free now, and that no other process of these tests is given."""
    for port in islice(_ports, A_PROCESS // STEP):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free for a test")
