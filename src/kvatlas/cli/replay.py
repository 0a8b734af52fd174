"""``kvatlas replay``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvatlas.backtest import Backtest, Captures, Prediction, Summary, read_requests
from kvatlas.cli.options import AsJson, BlockSize, duration
from kvatlas.cli.screen import quiet_logs, screen, show_json, table
from kvatlas.errors import RequestError
from kvatlas.ingest.playback import Pace, PlaybackPort, play, playback_ports
from kvatlas.serve.stopping import stopping_by

FAULTS = 1
"""Exit status where events could not be read."""


def replay(
    files: Annotated[list[Path], typer.Argument(help="Capture files, as `kvatlas record` writes them.", metavar="FILE...")],
    requests: Annotated[
        Path | None,
        typer.Option(help="Requests that were sent meanwhile, one JSON object a line: predict each one.", metavar="FILE"),
    ] = None,
    block_size: BlockSize = 16,
    decoder: Annotated[str, typer.Option(help="How events are encoded: vllm, sglang, generic, ...", metavar="NAME")] = "vllm",
    to: Annotated[
        str | None,
        typer.Option(
            help="Publish over ZMQ at this address instead, as an engine would: tcp://127.0.0.1:5557.", metavar="ENDPOINT"
        ),
    ] = None,
    replay_endpoint: Annotated[
        str | None,
        typer.Option(help="With --to: where replay requests are answered; by default at port + 50.", metavar="ENDPOINT"),
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0, help="With --to: factor on the recorded pace; 0 is as fast as possible.")
    ] = 1.0,
    align: Annotated[
        bool, typer.Option("--align", help="With --to: start all files at once, not as far apart as they were recorded.")
    ] = False,
    wait: Annotated[
        str, typer.Option(help="With --to: how long to wait for a subscriber before the first frame; 0 does not wait.")
    ] = "60s",
    linger: Annotated[
        str, typer.Option(help="With --to: how long to stay after the last frame, for replay requests. forever: until Ctrl-C.")
    ] = "2s",
    allow_truncated: Annotated[
        bool, typer.Option("--allow-truncated", help="Take a capture that was cut short as it is.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Run captures through the index offline and show what it would have predicted, or publish them again with --to.

    Several files are several streams (ranks, pods), merged by receive time. With --requests each request is predicted from the
    events received before it was sent, and compared with the engine's own cached_tokens where the record has them. With --json
    each request is a JSON object on a line of its own, and the last line is {"summary": ...}. Exit status 1: events were lost
    because they could not be read.

    With --to, file i is published at port + i, and answers replay requests at port + 50 + i.

    Examples:

        kvatlas replay engine.bin
        kvatlas replay truth-base.bin --requests truth-base.requests.jsonl
        kvatlas replay rank0.bin rank1.bin --requests requests.jsonl --json > predictions.jsonl
        kvatlas replay engine.bin --to tcp://127.0.0.1:5557 --speed 10
    """
    quiet_logs()
    if to is not None:
        if requests is not None:
            raise RequestError("--requests", "is for an offline replay", "leave out --to, or ask a service: kvatlas score")
        linger_s = None if linger == "forever" else _seconds("--linger", linger)
        pace = Pace(speed, align, _seconds("--wait", wait), linger_s)
        _publish(playback_ports(files, to, replay_endpoint), pace, allow_truncated)
        return
    _run(Captures(files, tolerate_truncation=allow_truncated), requests, block_size, decoder, as_json=json)


def _seconds(option: str, text: str) -> float:
    return 0.0 if text in ("0", "0s") else duration(option, text) or 0.0


# -- offline ----------------------------------------------------------------------------------------------------------


def _run(captures: Captures, requests: Path | None, block_size: int, decoder: str, *, as_json: bool) -> None:
    backtest = Backtest(captures, block_size_tokens=block_size, decoder=decoder)
    predictions = backtest.run(read_requests(requests) if requests is not None else ())
    if as_json:
        for prediction in predictions:
            show_json(_line(prediction))
        show_json({"summary": _summary_fields(backtest.summary())})
    else:
        _show(list(predictions), backtest.summary(), requests is not None)
    if backtest.summary().decode_faults:
        raise typer.Exit(FAULTS)


def _line(prediction: Prediction) -> dict[str, Any]:
    """Return a request's JSON object. Keys that say nothing special are left out."""
    request = prediction.request
    line: dict[str, Any] = {
        "tag": request.tag,
        "t": request.sent_s,
        "prompt_tokens": prediction.prompt_tokens,
        "predicted_cached_tokens": prediction.predicted_cached_tokens,
        "engine_cached_tokens": request.cached_tokens,
    }
    if prediction.predicted_by_rank:
        line["predicted_by_rank"] = prediction.predicted_by_rank
    if request.after_reset:
        line["after_reset"] = True
    if prediction.stale:
        line["stale"] = {pod: reason.value for pod, reason in prediction.stale.items()}
    return line


def _summary_fields(summary: Summary) -> dict[str, Any]:
    totals = {"decode_faults": summary.decode_faults, "unexplained_hashes": summary.unexplained_hashes}
    return {**msgspec.to_builtins(summary), **totals}


def _show(predictions: Sequence[Prediction], summary: Summary, with_requests: bool) -> None:
    console = screen()
    if with_requests:
        pods = sorted({pod for prediction in predictions for pod in prediction.predicted_cached_tokens})
        columns = ["predicted"] if len(pods) == 1 else [f"predicted {pod}" for pod in pods]
        numbers = ("time", "prompt", *columns, "engine")
        shown = table(
            "Cached tokens, predicted and as the engine said", "request", *numbers, "", right=numbers, whole=("", "time")
        )
        began_s = predictions[0].request.sent_s if predictions else 0.0
        for prediction in predictions:
            request = prediction.request
            shown.add_row(
                request.tag,
                f"+{request.sent_s - began_s:.3f} s",
                str(prediction.prompt_tokens),
                *(_predicted(prediction, pod) for pod in pods),
                "" if request.cached_tokens is None else str(request.cached_tokens),
                _remark(prediction),
            )
        console.print(shown)
    console.print(Panel.fit(Text("\n".join(_summary_lines(summary, with_requests))), title="Summary", title_align="left"))


def _predicted(prediction: Prediction, pod: Any) -> str:
    ranks = prediction.predicted_by_rank.get(pod)
    if ranks is None:
        return str(prediction.predicted_cached_tokens.get(pod, 0))
    return " ".join(f"rank {rank}: {tokens}" for rank, tokens in sorted(ranks.items()))


def _remark(prediction: Prediction) -> Text:
    parts = [f"stale: {reason.value}" for reason in dict.fromkeys(prediction.stale.values())]
    if prediction.request.after_reset:
        parts.append("first after a reset")
    text = Text({True: "exact", False: "differs", None: ""}[prediction.exact], "red" if prediction.exact is False else "green")
    return Text(", ").join([text, *map(Text, parts)]) if text.plain else Text(", ".join(parts))


def _summary_lines(summary: Summary, with_requests: bool) -> Iterable[str]:
    yield f"{summary.frames} frames of {', '.join(summary.streams) or 'no stream'}"
    yield f"sequence: {summary.gaps} gaps ({summary.frames_missed} frames missing), {summary.duplicates} duplicates, " + (
        f"{summary.restarts} restarts"
    )
    yield "events: " + (_counts(summary.events) or "none")
    yield "decode faults: " + (_counts(summary.decode_faults_by_reason) or "0")
    if summary.unknown_events:
        yield f"events of unknown types: {summary.unknown_events} (nothing is lost)"
    yield (
        f"unexplained hashes: {summary.unexplained_hashes} ({summary.removals_unknown} removals of blocks not held, "
        f"{summary.orphans} blocks without tokens)"
    )
    if not with_requests:
        return
    yield f"requests: {summary.requests}, {summary.compared} of them compared with the engine"
    if summary.compared:
        yield f"exact: {_share(summary.exact, summary.compared)}; without the first after each reset: " + _share(
            summary.exact_but_after_reset, summary.compared_but_after_reset
        )


def _counts(counts: Any) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.1%})" if whole else "")


# -- over ZMQ ---------------------------------------------------------------------------------------------------------


def _publish(ports: Sequence[PlaybackPort], pace: Pace, allow_truncated: bool) -> None:
    captures = Captures([port.path for port in ports], tolerate_truncation=allow_truncated)
    console = screen(stderr=True)
    for port in ports:
        console.print(f"{port.path} at {port.endpoint}, replay at {port.replay_endpoint}", soft_wrap=True)
    count = asyncio.run(_play(ports, pace, captures.frames, allow_truncated))
    console.print(f"published {count} of {captures.frames} frames")


async def _play(ports: Sequence[PlaybackPort], pace: Pace, total: int, allow_truncated: bool) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen(stderr=True)) as progress, stopping_by(None) as stopping:
        task = progress.add_task("waiting", total=total)

        def published(count: int) -> None:
            done = "published; ports stay open" if count == total else "publishing"
            progress.update(task, completed=count, description=done)

        return await play(
            ports,
            pace,
            stop=stopping.asked,
            published=published,
            waiting=lambda endpoint: progress.update(task, description=f"waiting for a subscriber at {endpoint}"),
            tolerate_truncation=allow_truncated,
        )
