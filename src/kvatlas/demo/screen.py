"""What the demo prints: tables that change in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvatlas.demo.fleet import MODEL, Engine, Router
from kvatlas.demo.tally import EXACT_MIN, Tally
from kvatlas.index.choice import describe_core

LINE_EVERY_S = 5.0
WIDTH_MAX = 110

Show = Callable[[Tally, Sequence[Engine], float | None], None]
"""Shows sums, engines, and how much of the run is over; None: it has no end."""


class Screen:
    """Writes to a terminal, or plainly to a file or pipe."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal or self._console.width > WIDTH_MAX:
            self._console.width = WIDTH_MAX
        self._line_s = 0.0

    def line(self, text: str = "") -> None:
        """Print a line; rich's markup is understood."""
        self._console.print(text, soft_wrap=True)

    def begin(self, engines: int) -> None:
        """Say what is about to happen."""
        self.line(
            f"[bold]kvatlas demo[/]: {engines} embedded engines (no GPU, no model: words for answers) with real KV events,"
        )
        self.line(
            "a router that knows from them who holds which prefix, and users with chats of a real trace. Starting them ..."
        )

    def up(self, router: Router, engines: Sequence[Engine], dashboard: str | None, took_s: float, *, stay: bool) -> None:
        """Say where everything is, and what can be tried."""
        chat = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Where is my flight?"}}]}}'
        self.line(f"Up in {took_s:.1f} s; core: {escape(describe_core())}\n")
        if dashboard is not None:
            self.line(f"  dashboard  {dashboard}")
        self.line(f"  router     {router.proxy}  (OpenAI's API; decisions and metrics: {router.api})")
        for engine in engines:
            self.line(f"  {engine.name}   {engine.started.url}  events {engine.started.events}")
        curl = f"curl -s {router.proxy}/v1/chat/completions -H 'content-type: application/json' -d '{chat}'"
        self.line(f"  try it     {escape(curl)}")
        self.line(f"  and then   kvatlas explain --url {router.api}\n")
        if self._console.is_terminal:
            self.line(f"  keys       k kills an engine, a adds one, q ends{'' if stay else ' early'}\n")

    def killed(self, engine: Engine, at_s: float) -> None:
        """Say that an engine is gone."""
        self.line(f"[bold]{at_s:5.1f} s  kill -9 {engine.name}[/] (pid {engine.process.pid}): nobody told the router")

    def joined(self, engine: Engine, at_s: float, took_s: float) -> None:
        """Say that there is a new engine."""
        self.line(
            f"[bold]{at_s:5.1f} s  {engine.name} joins[/], with an empty cache; {took_s:.1f} s later the router sends to it"
        )

    @contextlib.contextmanager
    def live(self) -> Iterator[Show]:
        """Show figures as long as the block lasts: call what it gives with them every now and then."""
        if not self._console.is_terminal:
            self._line_s = time.monotonic()
            yield self._show_line
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            yield lambda tally, engines, progress: live.update(_status(tally, engines, progress), refresh=True)

    def _show_line(self, tally: Tally, _engines: Sequence[Engine], _progress: float | None) -> None:
        if time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            self.line(f"         {_figures(tally)}")

    def summary(self, tally: Tally, engines: Sequence[Engine]) -> None:
        """Say what came of it."""
        self.line()
        self._console.print(_engines_table(tally, engines))
        compared = len(tally.compared)
        exact = tally.exact / max(1, compared)
        cached, uncached = (tally.ttft_s(cached=cached) for cached in (True, False))
        self.line(f"{len(tally.answered)} requests answered, {len(tally.failed)} failed.")
        self.line(
            f"Cached: {tally.hit_ratio:.1%} of {tally.prompt_tokens:,} prompt tokens;"
            f" in turns (round robin) it would have been {tally.in_turns_ratio:.1%}."
        )
        if cached is not None and uncached is not None:
            self.line(
                f"First token, median: {_ms(cached)} where most of the prompt was cached, {_ms(uncached)} where hardly any was."
            )
        self.line(
            f"Predicted from events before it was sent, and counted by the engine: {tally.exact} of {compared} exactly equal"
            f" ({exact:.1%}); the other {len(tally.answered) - compared} went where nothing had been published yet."
        )
        if not all(engine.alive for engine in engines):
            self.line(
                f"The kill: {tally.cut} answers under way broke off and were asked for again by their users;"
                f" {tally.moved} requests found nobody there, and the router sent them elsewhere."
            )
        for one in tally.failed[:5]:
            self.line(f"[red]failed[/]: {escape(one.problem or '')}")
        if tally.holds:
            self.line(
                f"\n[bold green]As promised[/]: no request failed, and {EXACT_MIN:.0%} of predictions or more were exact."
            )
        else:
            self.line(f"\n[bold red]NOT AS PROMISED[/]: no request may fail, and {EXACT_MIN:.0%} of predictions must be exact.")


def _status(tally: Tally, engines: Sequence[Engine], progress: float | None) -> Group:
    over = "" if progress is None else f"   {min(1.0, progress):.0%} of the run"
    return Group(_engines_table(tally, engines), Text(f"{_figures(tally)}{over}"))


def _figures(tally: Tally) -> str:
    cached, uncached = (tally.ttft_s(cached=cached) for cached in (True, False))
    return (
        f"{len(tally.sent)} requests, {len(tally.failed)} failed; cached {tally.hit_ratio:.0%}"
        f" (in turns {tally.in_turns_ratio:.0%}); first token {_ms(cached)} cached, {_ms(uncached)} not;"
        f" predictions {tally.exact}/{len(tally.compared)} exact"
    )


def _engines_table(tally: Tally, engines: Sequence[Engine]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("engine", no_wrap=True)
    for name in ("requests", "cached", "first token"):
        made.add_column(name, justify="right")
    made.add_column("")
    for engine in engines:
        one = tally.engine(engine.name)
        state = "" if engine.alive else "[red]killed[/]"
        made.add_row(one.name, str(one.requests), f"{one.hit_ratio:.0%}", _ms(one.ttft_s), state)
    return made


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
