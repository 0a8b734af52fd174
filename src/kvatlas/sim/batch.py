"""Many runs, in as many processes as are wanted; what is finished is there at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import NamedTuple

from kvatlas.errors import KvatlasError
from kvatlas.sim.plan import Plan, run
from kvatlas.sim.results import RunResult

LOOK_S = 0.2
"""How long Ctrl-C waits at most."""


class Outcome(NamedTuple):
    """What came of a plan: a result, or what went wrong."""

    plan: Plan
    result: RunResult | None
    problem: str = ""


def outcomes(plans: Sequence[Plan], jobs: int) -> Iterator[Outcome]:
    """Yield what came of each plan as it is finished. One process: this one. KeyboardInterrupt ends them all."""
    if jobs == 1 or len(plans) == 1:
        for plan in plans:
            yield _outcome(plan)
        return
    before = set(active_children())
    with ProcessPoolExecutor(min(jobs, len(plans)), get_context("spawn"), _deaf) as processes:
        pending = {processes.submit(_outcome, plan): plan for plan in plans}
        try:
            while pending:
                done, _ = wait(pending, LOOK_S, FIRST_COMPLETED)
                for future in done:
                    yield _of(future, pending.pop(future))
        finally:
            if pending:
                processes.shutdown(wait=False, cancel_futures=True)
                for process in set(active_children()) - before:
                    process.terminate()


def _outcome(plan: Plan) -> Outcome:
    try:
        return Outcome(plan, run(plan))
    except (KvatlasError, ValueError, MemoryError) as error:
        return Outcome(plan, None, str(error) or type(error).__name__)


def _of(future: Future[Outcome], plan: Plan) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:
        return Outcome(plan, None, "its process ended; there may not be memory for so many: give fewer --jobs")


def _deaf() -> None:
    """Leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
