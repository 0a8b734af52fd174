"""Keys that are pressed while the demo runs, where it runs in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping


@contextlib.contextmanager
def pressed(actions: Mapping[str, Callable[[], None]]) -> Iterator[None]:
    """Call what belongs to a key when it is pressed; nothing where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    loop = asyncio.get_running_loop()

    def read() -> None:
        for key in os.read(terminal, 64).decode("ascii", "ignore"):
            if key in actions:
                actions[key]()

    tty.setcbreak(terminal)
    loop.add_reader(terminal, read)
    try:
        yield
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
