"""``kvatlas pods``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.columns import Column, Gives, fitted
from kvatlas.cli.options import DEFAULT_URL, AsJson, ServiceToken, ServiceUrl, duration
from kvatlas.cli.screen import screen, show_table
from kvatlas.errors import RequestError
from kvatlas.results import PodStatus

GIVING_WAY = ("source", "restarts", "replays", "gaps", "queue", "block size", "model", "state", "last event", "rank", "pod")
"""What a narrow screen does without, the first one first. Which pods there are and whether they are stale stays."""

_STATE_STYLES = {"fresh": "green", "stale": "yellow", "connecting": "dim"}


def pods(
    url: ServiceUrl = DEFAULT_URL,
    token: ServiceToken = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show again and again, until Ctrl-C.")] = False,
    interval: Annotated[str, typer.Option(help="How often with --watch.", metavar="DURATION")] = "1s",
    json: AsJson = False,
) -> None:
    """Show the engines that a running service follows: one line for each data-parallel rank.

    The last event's age is by the engine's clock. "kvatlas doctor" says what to do about a stale one.

    Examples:

        kvatlas pods
        kvatlas pods --watch --url http://10.0.0.5:8080
        kvatlas pods --json | jq '.pods[] | select(.state != "fresh")'
    """
    client = ServiceClient(url, token)
    wait_s = duration("--interval", interval) or 1.0
    try:
        if json:
            _print_json(client, wait_s if watch else None)
        elif watch:
            _watch(client, wait_s)
        else:
            streams = client.pods()[0]
            show_table(lambda width: _shown(streams, width))
    except KeyboardInterrupt:
        return


def _print_json(client: ServiceClient, wait_s: float | None) -> None:
    while True:
        sys.stdout.write(client.pods()[1].decode() + "\n")
        sys.stdout.flush()
        if wait_s is None:
            return
        time.sleep(wait_s)


def _watch(client: ServiceClient, wait_s: float) -> None:
    console = screen()
    with Live(_shown(client.pods()[0], console.width), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(wait_s)
            try:
                live.update(_shown(client.pods()[0], console.width), refresh=True)
            except RequestError as error:  # it may be restarting: go on
                live.update(Text(str(error)), refresh=True)


def _shown(streams: Sequence[PodStatus], width: int | None) -> RenderableType:
    if not streams:
        remedy = "Let engines publish to the service's event address, or name them: --engine ADDRESS of kvatlas serve and route"
        return Text(f"No engine is known yet. {remedy}. What is wrong, kvatlas doctor says.")
    columns = [
        Column("pod", [Text(stream.pod) for stream in streams], Gives.SHORTEN),
        Column("model", [Text(stream.model or "?") for stream in streams], Gives.FOLD),
        _number("rank", [stream.dp_rank for stream in streams]),
        Column("blocks", [Text(str(stream.blocks)) for stream in streams], right=True),
        _number("block size", [", ".join(map(str, stream.block_sizes_tokens)) for stream in streams]),
        _number("queue", [stream.queue_depth for stream in streams]),
        _number("gaps", [stream.gaps for stream in streams]),
        _number("replays", [stream.replays for stream in streams]),
        _number("restarts", [stream.restarts for stream in streams]),
        _number("last event", [_age(stream.last_event_age_s) for stream in streams]),
        Column("state", [_state(stream) for stream in streams], Gives.WRAP),
        Column("source", [Text(stream.source) for stream in streams], Gives.DROP),
    ]
    order = [name for name in GIVING_WAY if name != "rank" or not any(stream.dp_rank for stream in streams)]
    return fitted("Event streams", columns, width, order)


def _number(name: str, values: Sequence[object]) -> Column:
    return Column(name, [Text(str(value)) for value in values], Gives.DROP, right=True)


def _age(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _state(stream: PodStatus) -> Text:
    reason = f": {stream.stale_reason.value}" if stream.stale_reason else ""
    orphans = f", {stream.orphans} blocks without tokens" if stream.orphans else ""
    return Text(stream.state + reason + orphans, _STATE_STYLES.get(stream.state, ""))
