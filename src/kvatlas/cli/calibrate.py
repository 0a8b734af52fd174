"""``kvatlas calibrate``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvatlas.cli.screen import screen, show_json, show_table, table
from kvatlas.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvatlas.sim.calibrate.endpoint import Cache, Endpoint
    from kvatlas.sim.calibrate.fit import Fit
    from kvatlas.sim.calibrate.measure import Measured
    from kvatlas.sim.calibrate.plan import Plan
    from kvatlas.sim.engines import EngineSpec


def calibrate(
    url: Annotated[str, typer.Argument(help="An idle engine's address, http://10.0.0.7:8000.", metavar="URL")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the engine to this file, for --spec of other commands.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Else the first that it lists.", metavar="NAME", show_default=False)
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=256, help="The longest prompt.", metavar="TOKENS")] = 4096,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Requests at once at most.", metavar="COUNT")] = 16,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Prompts of each length.", metavar="COUNT")] = 3,
    step_tokens: Annotated[int, typer.Option(min=1, help="The engine's --max-num-batched-tokens.", metavar="TOKENS")] = 8192,
    gpu_blocks: Annotated[
        int | None,
        typer.Option(min=2, help="Its KV blocks, where its metrics do not tell.", metavar="COUNT", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; else any.", metavar="NUMBER", show_default=False)] = None,
    token: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token.", metavar="TOKEN", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Measure how fast an engine is, for the simulator: what a step, a prompt's token and an answer's token cost.

    It sends random prompts, first alone, then several at a time, and fits the simulator's cost model to the times. Nobody else
    should use the engine meanwhile; its prefix cache is filled with the prompts. What it sends is said first.

    Examples:

        kvatlas calibrate http://10.0.0.7:8000 --out h100.yaml
        kvatlas engine --spec h100.yaml
    """
    asyncio.run(_Run(url, model, prompt_tokens, batch, repeats, step_tokens, gpu_blocks, seed, token, out, as_json).run())


class _Run(msgspec.Struct, frozen=True):
    """One calibration, from the first question to the file."""

    url: str
    model: str | None
    prompt_tokens: int
    batch: int
    repeats: int
    step_tokens: int
    gpu_blocks: int | None
    seed: int | None
    token: str | None
    out: Path | None
    as_json: bool

    @property
    def _screen(self) -> Console:
        return screen(stderr=self.as_json)

    async def run(self) -> None:
        from kvatlas.sim.calibrate.endpoint import Endpoint
        from kvatlas.sim.calibrate.fit import fit
        from kvatlas.sim.calibrate.plan import OUTPUT_TOKENS, make_plan

        if not self.url.startswith(("http://", "https://")):
            raise RequestError("URL", f"{self.url!r:.100} is no address", "give one such as http://10.0.0.7:8000")
        if self.out is not None and not self.out.parent.is_dir():
            raise RequestError("--out", f"{self.out.parent} is no directory", "name a file in one that there is")
        async with Endpoint(self.url, self.token) as endpoint:
            listed, limit = await endpoint.model()
            model = self.model or listed
            cache = await endpoint.cache()
            longest = self.prompt_tokens if limit is None else min(self.prompt_tokens, limit - OUTPUT_TOKENS)
            size, blocks = cache.block_size_tokens, cache.gpu_blocks
            plan = make_plan(longest, self.batch, self.repeats, size * blocks if size and blocks else None)
            self._announce(plan, model, cache)
            measured = await self._measure(endpoint, model, plan)
        if not measured.steps:
            raise RequestError("URL", "no batch could be measured", "see that nobody else uses the engine, or lower --batch")
        fitted = fit(measured.prompts, measured.steps, self.step_tokens)
        self._tell(fitted, measured, model, cache)

    def _announce(self, plan: Plan, model: str, cache: Cache) -> None:
        said = self._screen
        said.print(f"{self.url}: model {model}; {_cache_text(cache)}")
        said.print(
            f"Sends {plan.requests} requests, {plan.prompt_tokens:,} prompt tokens and {plan.output_tokens:,} of output:"
            f" prompts of {plan.prompts[0]} to {plan.prompts[-1]:,} tokens alone, {plan.repeats} of each; then up to"
            f" {max((one.requests for one in plan.batches), default=0)} at a time.",
            soft_wrap=True,
        )

    async def _measure(self, endpoint: Endpoint, model: str, plan: Plan) -> Measured:
        import random

        from kvatlas.sim.calibrate.measure import measure

        seed = random.SystemRandom().getrandbits(32) if self.seed is None else self.seed
        columns = (TextColumn("requests"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._screen) as progress:
            task = progress.add_task("", total=plan.requests)
            return await measure(endpoint, model, plan, seed, lambda count: progress.advance(task, count))

    def _tell(self, fitted: Fit, measured: Measured, model: str, cache: Cache) -> None:
        from kvatlas.sim.spec_file import spec_text

        spec = self._spec(fitted, cache)
        remarks = [
            f"{model} at {self.url}, by kvatlas calibrate: {len(fitted.times)} times,"
            f" off by {fitted.error_mean:.1%} on average and {fitted.error_max:.1%} at most.",
            f"A request took {fitted.request_s * 1e3:.1f} ms beside this: the way to the engine, which is not simulated.",
            *([] if cache.gpu_blocks or self.gpu_blocks else ["gpu_blocks is a guess: the engine did not tell."]),
            *measured.notes,
            *(f"{name} is 0: these times do not show it." for name in fitted.unknown),
        ]
        text = spec_text(spec, remarks)
        if self.out is not None:
            self.out.write_text(text, encoding="utf-8")
        if self.as_json:
            show_json({"spec": spec, "request_s": fitted.request_s, "times": fitted.times, "notes": remarks})
            return
        show_table(lambda _width: _times(fitted))
        self._screen.print(text, soft_wrap=True)
        if self.out is not None:
            self._screen.print(f"Written to {self.out}.")

    def _spec(self, fitted: Fit, cache: Cache) -> EngineSpec:
        from kvatlas.sim.engines import EngineSpec

        size = cache.block_size_tokens or 16
        blocks = self.gpu_blocks or cache.gpu_blocks or BLOCKS_GUESSED
        return EngineSpec(costs=fitted.costs, gpu_blocks=blocks, block_size_tokens=size, step_tokens_max=self.step_tokens)


BLOCKS_GUESSED = 20_000
"""Where nobody tells how many KV blocks an engine has."""


def _cache_text(cache: Cache) -> str:
    if cache.block_size_tokens is None or cache.gpu_blocks is None:
        return "its metrics do not tell block size and number of KV blocks"
    return f"{cache.gpu_blocks:,} KV blocks of {cache.block_size_tokens} tokens"


def _times(fitted: Fit) -> Table:
    made = table(
        "Measured and fitted", "time of", "measured ms", "fitted ms", "error", right=("measured ms", "fitted ms", "error")
    )
    for one in fitted.times:
        made.add_row(one.what, f"{one.measured_s * 1e3:.2f}", f"{one.fitted_s * 1e3:.2f}", f"{one.error:+.1%}")
    return made
