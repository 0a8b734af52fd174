"""``kvatlas demo``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer


def demo(
    engines: Annotated[int, typer.Option(min=2, max=32, help="Engines to begin with.", metavar="COUNT")] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="How long traffic flows.", metavar="SECONDS")] = 36.0,
    requests: Annotated[
        int | None, typer.Option(min=20, help="How many requests, instead of a time.", metavar="COUNT", show_default=False)
    ] = None,
    users: Annotated[int, typer.Option(min=1, max=256, help="Users that chat at the same time.", metavar="COUNT")] = 8,
    no_chaos: Annotated[bool, typer.Option("--no-chaos", help="Kill no engine, and add none.")] = False,
    stay: Annotated[bool, typer.Option("--stay", help="Go on until Ctrl-C.")] = False,
    seed: Annotated[int, typer.Option(help="Of the users.", metavar="NUMBER")] = 1,
) -> None:
    """See it work, without a GPU: embedded engines with real KV events, a router that reads them, chats of a real trace.

    While it runs an engine is killed and another one joins. At the end it says what was cached, how that compares with sending
    in turns, and how many predictions were what the engines then counted. All of it listens on free loopback ports and ends
    with the demo. Exit status 1: a request failed, or predictions were not exact.

    Examples:

        kvatlas demo
        kvatlas demo --stay --engines 6
        kvatlas demo --no-chaos --requests 200
    """
    from kvatlas.demo.course import DemoOptions, run
    from kvatlas.demo.screen import Screen

    options = DemoOptions(
        engines=engines, users=users, seconds=seconds, requests=requests, chaos=not no_chaos, stay=stay, seed=seed
    )
    if not asyncio.run(run(options, Screen())):
        raise typer.Exit(1)
