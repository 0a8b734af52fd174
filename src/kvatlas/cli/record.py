"""``kvatlas record``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvatlas.cli.options import duration
from kvatlas.cli.screen import quiet_logs, screen
from kvatlas.errors import RequestError
from kvatlas.ingest.recording import RecordingWriter
from kvatlas.ingest.tap import Heard, Tap, TapLimits, TappedEngine
from kvatlas.serve.stopping import stopping_by
from kvatlas.types import Frame

NOTHING = 1
"""Exit status where no frame came."""


def record(
    endpoints: Annotated[
        list[str], typer.Argument(help="Where engines publish events, as tcp://10.0.0.7:5557.", metavar="ENDPOINT...")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The capture file; an existing one is replaced.", metavar="FILE")
    ],
    replay: Annotated[
        list[str] | None,
        typer.Option(help="Where the engine answers replay requests: what it keeps is recorded first. One for each endpoint."),
    ] = None,
    run_time: Annotated[
        str | None, typer.Option("--duration", help="Stop after this time, as 30s or 10m.", metavar="DURATION")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.", metavar="N")] = None,
    topic: Annotated[str, typer.Option(help="Only topics that begin with this.")] = "",
) -> None:
    """Record engines' event streams into a capture file, byte for byte and with times. Ctrl-C ends it.

    Frames are written as they arrive, so a capture that was cut short is good up to its end. `kvatlas replay` reads it. Exit
    status 1: no frame came.

    Examples:

        kvatlas record tcp://10.0.0.7:5557 -o engine.bin
        kvatlas record tcp://10.0.0.7:5557 --replay tcp://10.0.0.7:5607 -o engine.bin --duration 10m
        kvatlas record tcp://10.0.0.7:5557 tcp://10.0.0.7:5558 -o both-ranks.bin --frames 1000
    """
    if replay and len(replay) != len(endpoints):
        raise RequestError("--replay", f"{len(replay)} for {len(endpoints)} endpoints", "give one for each, in the same order")
    engines = [TappedEngine(endpoint, replay[i] if replay else None) for i, endpoint in enumerate(endpoints)]
    limits = TapLimits(duration_s=duration("--duration", run_time), frames_max=frames)
    quiet_logs()
    heard = asyncio.run(_record(engines, output, topic, limits))
    _report(heard, output)


async def _record(engines: Sequence[TappedEngine], output: Path, topic: str, limits: TapLimits) -> list[Heard]:
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=screen(stderr=True))
    with RecordingWriter(output) as writer, progress, stopping_by(None) as stopping:
        task = progress.add_task(f"waiting for {', '.join(engine.endpoint for engine in engines)}", total=None)

        def take(_heard: Heard, frame: Frame, _live: bool) -> None:
            writer.append_frame(frame)
            writer.flush()
            progress.update(task, description=f"{writer.records} frames into {output}")

        return await Tap(engines, take, topic_filter=topic, limits=limits).run(stopping.asked)


def _report(heard: Sequence[Heard], output: Path) -> None:
    console = screen(stderr=True)
    for one in heard:
        parts = [f"{one.live_frames} frames"]
        if one.engine.replay_endpoint is not None:
            parts.append(
                f"{one.kept_frames} more that it had kept" if one.replay_answered else "no answer from its replay port"
            )
        if one.malformed:
            parts.append(f"{one.malformed} messages left out that are no event frames")
        if not one.connected:
            parts.append("never connected: check the address")
        console.print(f"{one.engine.endpoint}: {', '.join(parts)}")
    if not any(one.live_frames or one.kept_frames for one in heard):
        console.print("Nothing was recorded. Look for the reason: kvatlas doctor --engine ENDPOINT")
        raise typer.Exit(NOTHING)
    console.print(f"Written to {output}. Look at it: kvatlas replay {output}", soft_wrap=True)
