"""What the demo prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvatlas.demo.captures import RecordedEngine, Recording
from kvatlas.demo.timeline import Check, Tally
from kvatlas.index.choice import describe_core
from kvatlas.ingest.publisher import EventPublisher

_WIDTH_MAX = 110


class ProgressBar:
    """Counts answers as they come."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task
        self._exact = 0

    def add(self, check: Check) -> None:
        self._exact += check.exact
        self._progress.update(self._task, advance=1, exact=self._exact)  # type: ignore[arg-type]  # TaskID is an int


class Screen:
    """Writes to a terminal, or plainly to a file or pipe."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        if not self._console.is_terminal or self._console.width > _WIDTH_MAX:
            self._console.width = _WIDTH_MAX

    def line(self, text: str = "") -> None:
        """Print a line; rich's markup is understood."""
        self._console.print(text, soft_wrap=True)

    def engines(self, recordings: Sequence[Recording], publishers: Mapping[RecordedEngine, EventPublisher]) -> None:
        """Say which engines there are."""
        self.line("[bold]kvatlas demo[/]: two recorded vLLM 0.32 engines, a running service, and its answers checked\n")
        self.line("Engines: publishers that replay over ZeroMQ what the real engines sent, byte for byte")
        for recording in recordings:
            engine, publisher = recording.engine, publishers[recording.engine]
            self.line(
                f"  [cyan]{engine.pod}[/]  events {publisher.endpoint}, replay {publisher.replay_endpoint}\n"
                f"    {len(recording.frames)} event frames, {len(recording.requests)} requests; {engine.about}"
            )

    def service(self, url: str, command: Sequence[str], seconds: float) -> None:
        """Say where the service is, what it runs on and what to try while it runs."""
        self.line(f"\nService: [cyan]{escape(' '.join(command))}[/], up in {seconds:.1f} s")
        self.line(f"  core      {escape(describe_core())}")
        self.line(f"  API docs  {url}/docs")
        self.line(f"  try it    curl -s {url}/v1/pods\n")

    def killed(self, command: Sequence[str]) -> None:
        """Say that the service is gone."""
        self.line(f"\n[bold]kill -9[/]: the service is gone, and all it knew. Again: [cyan]{escape(' '.join(command))}[/]")

    def caught_up(self, frames: int, start_s: float, replay_s: float) -> None:
        """Say how fast a new service knew everything again."""
        self.line(
            f"Up in {start_s:.1f} s; {replay_s:.2f} s later it had asked both engines to replay what it missed,"
            f" and applied all {frames} frames.\n"
        )

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[ProgressBar]:
        """Show how far the questions are."""
        columns = (
            TextColumn(text),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[exact]} exact"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            yield ProgressBar(progress, progress.add_task("", total=total, exact=0))

    def samples(self, rows: Sequence[Check], total: int) -> None:
        """Show single predictions beside the engine's own figures."""
        shown = _table(f"Predicted and true cached tokens: {len(rows)} of {total} requests")
        shown.add_column("request")
        for name in ("prompt", "predicted", "engine's own"):
            shown.add_column(name, justify="right")
        shown.add_column("")
        for check in rows:
            verdict = "[green]exact[/]" if check.exact else _odd(check)
            shown.add_row(
                check.engine.pod,
                check.request.tag + (" salted" if check.request.cache_salt else ""),
                str(len(check.request.token_ids)),
                str(check.predicted),
                str(check.request.cached_tokens),
                verdict,
            )
        self.line()
        self._console.print(shown)

    def totals(self, rows: Sequence[Tally]) -> None:
        """Show the sums by engine."""
        shown = _table("All requests")
        for name in ("requests", "exact", "after reset", "wrong", "tokens", "from cache"):
            shown.add_column(name, justify="right")
        for row in rows:
            share = row.cached_tokens / row.prompt_tokens if row.prompt_tokens else 0.0
            shown.add_row(
                row.engine.pod,
                str(row.requests),
                str(row.exact),
                str(row.after_reset),
                f"[red]{row.wrong}[/]" if row.wrong else "0",
                f"{row.prompt_tokens:,}",
                f"{row.cached_tokens:,} ({share:.0%})",
            )
        self._console.print(shown)

    def verdict(self, rows: Sequence[Tally], answer_ms: float) -> None:
        """Say what the sums mean."""
        requests, exact, after_reset, wrong = (
            sum(counts) for counts in zip(*((row.requests, row.exact, row.after_reset, row.wrong) for row in rows), strict=True)
        )
        saved = sum(row.cached_tokens for row in rows)
        mark = "[bold red]NOT AS PROMISED[/]" if wrong else "[bold green]As promised[/]"
        self.line(f"\n{mark}: {exact} of {requests} predictions are exactly what the engine then reported as cached_tokens.")
        self.line(f"The engines did not compute {saved:,} prompt tokens again; the index knew beforehand which.")
        self.line(f"An answer over HTTP took {answer_ms:.1f} ms (median).")
        if after_reset:
            self.line(f"Not exact: {after_reset} (the first request after a cache reset). vLLM publishes a reset with its next")
            self.line("step, so when that request comes nobody outside can know of it. All later ones are exact again.")
        if wrong:
            self.line(f"[red]{wrong} predictions are wrong and should not be: please report this with the table above.[/]")

    def try_it(self, url: str, model: str, token_ids: Sequence[int]) -> None:
        """Say what can be asked now."""
        body = f'{{"model": "{model}", "token_ids": [{", ".join(map(str, token_ids))}]}}'
        self.line(
            f"\nStill running; API docs {url}/docs. Who holds the first {len(token_ids)} tokens of {model}'s last prompt?\n"
        )
        self.line(escape(f"curl -s {url}/v1/score -d '{body}'"))
        self.line("\nCtrl-C ends it.")

    def ended(self) -> None:
        """Say how to see more."""
        self.line('\nEngines and service have ended. To ask them yourself: make demo DEMO_ARGS="--stay"')


def _table(title: str) -> Table:
    """Return a table that fits into 80 columns; its first column is the engine."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("engine", no_wrap=True)
    return table


def _odd(check: Check) -> str:
    return "[yellow]after a reset[/]" if check.holds else "[red]wrong[/]"
