"""One simulated engine in real time: requests in, tokens and KV events out, when an engine would have them."""

from __future__ import annotations

import asyncio
import enum
import math
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from kvatlas.sim.engines import Engines, EngineSpec, EngineState, Happening, Job, Kind
from kvatlas.sim.live.kv_events import KvEvents
from kvatlas.sim.live.metrics import EngineMetrics

ENGINE = 0
"""There is one."""

LOAD_POLL_S = 0.001
STEP_S_MIN = 1e-6
"""A step takes some time of its own: others could not come between steps that take none."""


class End(enum.Enum):
    """How a generation ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    """Longer than the engine's whole memory."""
    STOPPED = "stopped"
    """The engine stops."""


class Generation:
    """One request in the engine. ``wait`` tells how far it is."""

    def __init__(self, number: int, tokens: array[int], prompt_tokens: int, keys: array[int], salt: str | None) -> None:
        self.number = number
        self.tokens = tokens
        """array('I'): the prompt, and behind it the answer."""
        self.prompt_tokens = prompt_tokens
        self.keys = keys
        """array('Q'): hashes of the whole blocks of ``tokens``."""
        self.salt = salt
        self.cached_tokens = 0
        """Known with the first token."""
        self.produced = 0
        """Tokens of the answer so far."""
        self.end: End | None = None
        self.came_s = time.perf_counter()
        self.began_s: float | None = None
        """When it ran first."""
        self.token_s = self.came_s
        """When its last token came."""
        self._changed = asyncio.Event()

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    async def wait(self, seen: int) -> None:
        """Return when there are more than ``seen`` tokens, or it has ended."""
        while self.produced <= seen and self.end is None:
            self._changed.clear()
            await self._changed.wait()

    def advance(self, produced: int, end: End | None = None) -> None:
        self.produced, self.end = produced, end
        self._changed.set()


class LiveEngine:
    """Drives an engine by a clock. All calls come from one event loop; ``run`` is a task there.

    What a step does to the cache is published when it ends, before its tokens are told, as vLLM does. A preempted request's
    tokens come with its last one: the engine model does not tell when it goes on.
    """

    def __init__(
        self,
        engines: Engines,
        spec: EngineSpec,
        *,
        events: KvEvents,
        publish: Callable[[bytes], Awaitable[object]] | None,
        metrics: EngineMetrics,
        speed: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``engines``: with no engine yet. ``speed``: how many of its seconds pass in one of ours."""
        self._engines = engines
        self._events = events
        self._publish = publish
        self._metrics = metrics
        self._speed = speed
        self._clock = clock
        self._began_s = clock()
        self._at_s = 0.0
        """How far the engine is, in its own time."""
        self._generations: dict[int, Generation] = {}
        self._decoding: dict[int, Generation] = {}
        """Those that get a token with each step."""
        self._inbox: list[Callable[[], None]] = []
        self._woken = asyncio.Event()
        self._stopped = False
        costs = replace(spec.costs, step_s=max(spec.costs.step_s, STEP_S_MIN))
        engines.join(replace(spec, costs=costs), 0.0)

    @property
    def state(self) -> EngineState:
        return self._engines.state(ENGINE)

    def submit(self, generation: Generation) -> None:
        """Take a request. Once stopped, it ends at once."""
        if self._stopped:
            generation.advance(0, End.STOPPED)
            return
        self._generations[generation.number] = generation
        job = Job(generation.number, generation.keys, generation.prompt_tokens, generation.output_tokens)
        self._ask(lambda: self._engines.add(ENGINE, job, self._at_s))

    def abort(self, generation: Generation) -> None:
        """Drop a request whose client went; one that has ended is left as it is."""
        if generation.end is None and not self._stopped:
            generation.end = End.STOPPED
            self._ask(lambda: self._drop(generation.number))

    async def reset_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing is done, while requests run. Told with the next step's events."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._ask(lambda: done.set_result(self._reset()))
        return await done

    async def run(self) -> None:
        """Run until cancelled; then all requests end."""
        try:
            while True:
                now_s = self._now()
                await self._catch_up(now_s)
                self._at_s = max(self._at_s, now_s)
                asked, self._inbox = self._inbox, []
                for action in asked:
                    action()
                self._note(self._engines.run(self._at_s)[1])
                await self._catch_up(self._at_s)
                await self._pause()
        finally:
            self._stopped = True
            for generation in self._generations.values():
                generation.advance(generation.produced, End.STOPPED)

    def _ask(self, action: Callable[[], None]) -> None:
        """Have something done at a time of its own, between steps' ends and beginnings."""
        self._inbox.append(action)
        self._woken.set()

    def _now(self) -> float:
        return (self._clock() - self._began_s) * self._speed

    async def _pause(self) -> None:
        """Wait until a step ends, or somebody asks for something."""
        state = self.state
        if state.step_ends_s is not None:
            timeout_s: float | None = max(0.0, (state.step_ends_s - self._now()) / self._speed)
        else:  # requests that wait meanwhile are being loaded: the engine does not say until when
            timeout_s = LOAD_POLL_S if state.waiting else None
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

    async def _catch_up(self, until_s: float) -> None:
        """End every step that ends by then, and begin the next ones, one by one."""
        while True:
            state = self.state
            if state.step_ends_s is not None:
                if state.step_ends_s > until_s:
                    return
                await self._end_step(state.step_ends_s)
            elif state.waiting or state.running:
                self._begin_step(until_s)
                if self.state.step_ends_s is None:
                    return
            else:
                return

    def _begin_step(self, until_s: float) -> None:
        """Begin a step that is due, or one that waited for a load which was over by then."""
        for reached_s in (math.nextafter(self._at_s, math.inf), until_s):
            if self.state.step_ends_s is None and reached_s >= self._at_s:
                self._at_s, happened = self._engines.run(reached_s)
                self._note(happened)

    async def _end_step(self, ends_s: float) -> None:
        self._at_s, happened = self._engines.run(ends_s)
        finished = {one.job for one in happened if one.kind is Kind.FINISHED}
        decoded = [one for one in self._decoding.values() if one.number not in finished]
        self._note([one for one in happened if one.kind in _CACHE])
        payload = self._events.take(time.time())
        if payload is not None and self._publish is not None:
            await self._publish(payload)
        for generation in decoded:
            self._token(generation, min(generation.produced + 1, generation.output_tokens - 1))
        self._note([one for one in happened if one.kind not in _CACHE])

    def _note(self, happened: Sequence[Happening]) -> None:
        for one in happened:
            if one.kind is Kind.REMOVED:
                self._events.removed(one.tier, one.keys)
                continue
            generation = self._generations.get(one.job)
            if generation is not None:
                self._note_job(generation, one)

    def _note_job(self, generation: Generation, one: Happening) -> None:
        match one.kind:
            case Kind.SCHEDULED:
                generation.cached_tokens = one.first + one.many
                generation.began_s = time.perf_counter()
                self._metrics.scheduled(generation.prompt_tokens, one.first, one.many, generation.began_s - generation.came_s)
            case Kind.STORED:
                self._events.stored(generation.tokens, generation.keys, one.first, one.many, one.tier, generation.salt)
            case Kind.FIRST_TOKEN:
                self._token(generation, 1)
                self._decoding[generation.number] = generation
            case Kind.PREEMPTED:
                self._decoding.pop(generation.number, None)
                self._metrics.preempted()
            case Kind.FINISHED:
                self._forget(generation.number)
                self._token(generation, generation.output_tokens, End.FINISHED)
                self._metrics.finished(time.perf_counter() - generation.came_s)
            case Kind.REFUSED:
                self._forget(generation.number)
                generation.advance(0, End.REFUSED)

    def _token(self, generation: Generation, produced: int, end: End | None = None) -> None:
        """Tell a generation's tokens up to ``produced``."""
        now_s = time.perf_counter()
        new = produced - generation.produced
        if new:
            first = generation.produced == 0
            since_s = generation.came_s if first else generation.token_s
            self._metrics.tokens(new, now_s - since_s, first=first)
            generation.token_s = now_s
        if generation.end is None and (new or end is not None):
            generation.advance(produced, end)

    def _drop(self, number: int) -> None:
        if self._forget(number):
            self._engines.abort(ENGINE, number, self._at_s)
            self._metrics.aborted()

    def _forget(self, number: int) -> bool:
        self._decoding.pop(number, None)
        return self._generations.pop(number, None) is not None

    def _reset(self) -> bool:
        done = self._engines.reset_cache(ENGINE, self._at_s)
        if done:
            self._events.cleared()
        return done


_CACHE = (Kind.STORED, Kind.REMOVED)
