"""The demo's command line and its course, from the first engine to the last sum."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from kvatlas.demo.captures import ENGINES, load
from kvatlas.demo.screen import Screen
from kvatlas.demo.service import Service
from kvatlas.demo.timeline import Asked, Check, Timeline, median_answer_ms, sample, tallies
from kvatlas.errors import KvatlasError
from kvatlas.ingest.publisher import EventPublisher

ANY_PORT = "tcp://127.0.0.1:0"
SAMPLE_ROWS = 14
CURL_TOKENS = 33


def main() -> int:
    """Run the demo; 0 if every prediction held, 1 if one did not, 2 if the demo could not run."""
    arguments = _arguments()
    try:
        return asyncio.run(_demo(arguments.requests, arguments.stay, Screen()))
    except KvatlasError as error:
        print(f"kvatlas demo: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvatlas.demo", description="Two recorded engines and a service, checked.")
    parser.add_argument("--requests", type=int, metavar="N", help="ask about the first N requests only (default: all)")
    parser.add_argument("--stay", action="store_true", help="leave engines and service running at the end, until Ctrl-C")
    arguments = parser.parse_args()
    if arguments.requests is not None and arguments.requests < 2:
        parser.error("--requests: at least 2")
    return arguments


async def _demo(requests_max: int | None, stay: bool, screen: Screen) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # else the service would outlive the demo
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvatlas-demo-")))
        recordings = [load(engine, folder) for engine in ENGINES]
        publishers = {engine: await stack.enter_async_context(EventPublisher(ANY_PORT, ANY_PORT)) for engine in ENGINES}
        screen.engines(recordings, publishers)
        timeline = Timeline(recordings, publishers)
        asked = timeline.requests()[:requests_max]
        half = len(asked) // 2

        async with Service(folder, publishers) as service:
            screen.service(service.url, service.command, service.start_s)
            for publisher in publishers.values():
                await publisher.wait_for_subscriber()
            checks = await _ask(timeline, service, asked[:half], screen)
            service.kill()
        screen.killed(service.command)
        async with Service(folder, publishers, service.port) as service:
            began_s = time.perf_counter()
            await service.applied(timeline.published)
            screen.caught_up(sum(timeline.published.values()), service.start_s, time.perf_counter() - began_s)
            checks += await _ask(timeline, service, asked[half:], screen)
            _report(checks, screen)
            if stay:
                await _stay(timeline, service, screen)
    screen.ended()
    return 0 if all(check.holds for check in checks) else 1


async def _ask(timeline: Timeline, service: Service, asked: Sequence[Asked], screen: Screen) -> list[Check]:
    checks = []
    with screen.progress("asking about each request", len(asked)) as bar:
        async for check in timeline.check(service, asked):
            checks.append(check)
            bar.add(check)
    return checks


def _report(checks: Sequence[Check], screen: Screen) -> None:
    screen.samples(sample(checks, SAMPLE_ROWS), len(checks))
    sums = list(tallies(checks))
    screen.totals(sums)
    screen.verdict(sums, median_answer_ms(checks))


async def _stay(timeline: Timeline, service: Service, screen: Screen) -> None:
    """Leave everything running until the user has seen enough. The last prompt's blocks are held, whatever came before."""
    await timeline.advance(math.inf)
    await service.applied(timeline.published)
    last = next(asked for asked in reversed(timeline.requests()) if asked.engine is ENGINES[0])
    screen.try_it(service.url, last.engine.model, last.request.token_ids[:CURL_TOKENS].tolist())
    await asyncio.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
