"""``kvatlas pods``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.options import DEFAULT_URL, AsJson, ServiceToken, ServiceUrl, duration
from kvatlas.cli.screen import screen, table
from kvatlas.errors import RequestError
from kvatlas.results import PodStatus

WIDE = 120
"""Columns from which on all is shown; a narrower screen has what matters most."""

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
            console = screen()
            console.print(_shown(client.pods()[0], console.width))
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


def _shown(streams: Sequence[PodStatus], width: int) -> Group:
    if not streams:
        remedy = "Let engines publish to the service's event address, or name them: kvatlas serve --engine ADDRESS"
        return Group(Text(f"No engine is known yet. {remedy}"))
    wide = width >= WIDE
    more = ("block size", "queue", "gaps", "replays", "restarts") if wide else ()
    numbers = ("rank", "blocks", *more, "last event")
    columns = ("pod", "model", *numbers, "state", *(("source",) if wide else ()))
    shown = table("Event streams", *columns, right=numbers, whole=("pod", *numbers))
    for stream in streams:
        age_s = stream.last_event_age_s
        sizes = ", ".join(map(str, stream.block_sizes_tokens))
        details = (sizes, *map(str, (stream.queue_depth, stream.gaps, stream.replays, stream.restarts)))
        shown.add_row(
            stream.pod,
            stream.model or "?",
            str(stream.dp_rank),
            str(stream.blocks),
            *(details if wide else ()),
            "" if age_s is None else f"{age_s:.1f} s",
            Text(_state(stream), _STATE_STYLES.get(stream.state, "")),
            *((stream.source,) if wide else ()),
        )
    return Group(shown)


def _state(stream: PodStatus) -> str:
    reason = f": {stream.stale_reason.value}" if stream.stale_reason else ""
    orphans = f", {stream.orphans} blocks without tokens" if stream.orphans else ""
    return stream.state + reason + orphans
