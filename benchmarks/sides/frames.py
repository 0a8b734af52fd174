"""Both sides reading the same frames from ZMQ sockets: the CPU seconds that each part of them takes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.sides.dynamo_service import service
from benchmarks.sides.process import Placement, Worker
from benchmarks.sides.publisher import Frames, publisher


def service_cpu_s(place: Placement, pods: int, parts: Sequence[Frames]) -> list[float]:
    """Publish to a new Dynamo service; a part begins when the one before was applied."""
    taken = []
    with publisher(pods, place) as engines, service(place) as running:
        running.register(engines.endpoints)
        engines.wait()
        for part in parts:
            started = running.cpu_s()
            engines.publish(part)
            running.wait_for(part, pods)
            taken.append(running.cpu_s() - started)
    return taken


def ours_cpu_s(place: Placement, ours: Worker, pods: int, parts: Sequence[Frames]) -> list[float]:
    """Publish to a kvatlas worker with a new index."""
    taken = []
    with publisher(pods, place) as engines:
        ours.ask("new")
        ours.ask("connect", endpoints=engines.endpoints)
        engines.wait()
        for part in parts:
            ours.start("receive", frames=len(part.sent))
            engines.publish(part)
            taken.append(ours.answer()["cpu_s"])
        ours.ask("disconnect")
    return taken
