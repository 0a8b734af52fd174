"""One worker process. It reads its plan from standard input, and ends when that is closed: its supervisor is gone then.

On standard output it says once how its start went (:class:`Started`); whatever else is written there goes to standard error.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable

import msgspec
import uvloop

from kvatlas.errors import KvatlasError
from kvatlas.observe.logs import configure_logs, get_logger
from kvatlas.serve.service import Addresses, keep_what_is_loaded, serve
from kvatlas.serve.workers.plan import Plan, read_plan

FAILED = 2

_log = get_logger(__name__)


class Started(msgspec.Struct, frozen=True):
    """How a worker's start went."""

    addresses: Addresses | None = None
    problem: str | None = None
    """Why it can't run: settings, or an address that is taken."""


def main() -> None:
    """Run the worker that standard input describes."""
    report = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    plan = read_plan(sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(4), "big")))

    def tell(started: Started) -> None:
        os.write(report, msgspec.json.encode(started) + b"\n")

    configure_logs(plan.config.log, bound={"worker": plan.worker.number})
    try:
        uvloop.run(_work(plan, tell))
    except KvatlasError as error:
        tell(Started(problem=str(error)))
        sys.exit(FAILED)


async def _work(plan: Plan, tell: Callable[[Started], None]) -> None:
    def orphaned() -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        _log.warning("the supervisor is gone")
        shutil.rmtree(plan.directory, ignore_errors=True)
        signal.raise_signal(signal.SIGTERM)

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), orphaned)
    await serve(
        plan.config,
        started=lambda addresses: tell(Started(addresses)),
        ready=keep_what_is_loaded,
        worker=plan.worker,
    )


if __name__ == "__main__":
    main()
