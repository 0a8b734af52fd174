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
            screen().print(_shown(client.pods()[0]))
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
    with Live(_shown(client.pods()[0]), console=screen(), auto_refresh=False) as live:
        while True:
            time.sleep(wait_s)
            try:
                live.update(_shown(client.pods()[0]), refresh=True)
            except RequestError as error:  # it may be restarting: go on
                live.update(Text(str(error)), refresh=True)


def _shown(streams: Sequence[PodStatus]) -> Group:
    numbers = ("rank", "blocks", "queue", "gaps/replays/restarts", "last event")
    columns = (
        "pod",
        "rank",
        "model",
        "state",
        "blocks",
        "block size",
        "queue",
        "gaps/replays/restarts",
        "last event",
        "source",
    )
    shown = table("Event streams", *columns, right=numbers)
    for stream in streams:
        state = stream.state + (f": {stream.stale_reason.value}" if stream.stale_reason else "")
        age_s = stream.last_event_age_s
        shown.add_row(
            stream.pod,
            str(stream.dp_rank),
            stream.model or "?",
            Text(state, _STATE_STYLES.get(stream.state, "")),
            f"{stream.blocks} ({stream.orphans} without tokens)" if stream.orphans else str(stream.blocks),
            ", ".join(map(str, stream.block_sizes_tokens)),
            str(stream.queue_depth),
            f"{stream.gaps}/{stream.replays}/{stream.restarts}",
            "" if age_s is None else f"{age_s:.1f} s ago",
            stream.source,
        )
    if streams:
        return Group(shown)
    return Group(
        Text("No engine is known yet. Let engines publish to the service's event address, or name them: serve --engine.")
    )
