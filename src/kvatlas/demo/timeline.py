"""Replays the recordings and asks the service about each request at its own moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import msgspec

from kvatlas.backtest import RecordedRequest
from kvatlas.demo.captures import RecordedEngine, Recording
from kvatlas.demo.service import Service
from kvatlas.ingest.publisher import EventPublisher


class Asked(msgspec.Struct, frozen=True):
    """One request of one engine; ``at_s`` counts from the engine's first request, so both engines share a clock."""

    at_s: float
    engine: RecordedEngine
    request: RecordedRequest


class Check(msgspec.Struct, frozen=True):
    """One prediction beside what the engine said. ``predicted`` and the engine's own figure are tokens."""

    engine: RecordedEngine
    request: RecordedRequest
    predicted: int
    answer_s: float

    @property
    def exact(self) -> bool:
        return self.predicted == self.request.cached_tokens

    @property
    def holds(self) -> bool:
        """Exact, or the one exception: the engine publishes a reset only at its next step, after this request."""
        return self.exact or self.request.after_reset


class Tally(msgspec.Struct, frozen=True):
    """Checks of one engine, summed up."""

    engine: RecordedEngine
    requests: int
    exact: int
    after_reset: int
    """Not exact, and the first after a reset."""
    wrong: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the engine did not compute again."""


class Timeline:
    """Both engines' recordings on one clock. What an engine sent before a request is published before it is asked about."""

    def __init__(self, recordings: Sequence[Recording], publishers: Mapping[RecordedEngine, EventPublisher]) -> None:
        self._recordings = recordings
        self._publishers = publishers
        self._published = {recording.engine.pod: 0 for recording in recordings}

    @property
    def published(self) -> Mapping[str, int]:
        """Frames published so far, by pod."""
        return self._published

    def requests(self) -> list[Asked]:
        """Return all requests in the order of their times."""
        asked = [
            Asked(request.sent_s - recording.start_s, recording.engine, request)
            for recording in self._recordings
            for request in recording.requests
        ]
        return sorted(asked, key=lambda one: one.at_s)

    async def advance(self, until_s: float) -> None:
        """Publish every frame that the engines had sent by then."""
        for recording in self._recordings:
            pod, frames = recording.engine.pod, recording.frames
            until_ns = (recording.start_s + until_s) * 1e9
            while self._published[pod] < len(frames) and frames[self._published[pod]].received_ns < until_ns:
                frame = frames[self._published[pod]]
                assert frame.seq is not None
                await self._publishers[recording.engine].publish_frame(frame.topic.encode(), frame.seq, frame.payload)
                self._published[pod] += 1

    async def check(self, service: Service, requests: Sequence[Asked]) -> AsyncIterator[Check]:
        """Ask about each request as soon as the service has applied what came before it."""
        for one in requests:
            await self.advance(one.at_s)
            await service.applied(self._published)
            began_s = time.perf_counter()
            predicted = await service.predict(one.engine, one.request)
            yield Check(one.engine, one.request, predicted, time.perf_counter() - began_s)


def tallies(checks: Sequence[Check]) -> Iterator[Tally]:
    """Yield the sums of each engine, in the order in which they first appear."""
    for engine in dict.fromkeys(check.engine for check in checks):
        own = [check for check in checks if check.engine == engine]
        yield Tally(
            engine=engine,
            requests=len(own),
            exact=sum(check.exact for check in own),
            after_reset=sum(check.holds and not check.exact for check in own),
            wrong=sum(not check.holds for check in own),
            prompt_tokens=sum(len(check.request.token_ids) for check in own),
            cached_tokens=sum(check.request.cached_tokens or 0 for check in own),
        )


def median_answer_ms(checks: Sequence[Check]) -> float:
    """Return the median time of an answer over HTTP, as the demo saw it."""
    return statistics.median(check.answer_s for check in checks) * 1000


def sample(checks: Sequence[Check], count: int) -> list[Check]:
    """Return all checks that were not exact, and exact ones spread over the run, in order; about ``count`` of them."""
    odd = {i for i, check in enumerate(checks) if not check.exact}
    hits = [i for i, check in enumerate(checks) if check.exact and (check.request.cached_tokens or 0) > 0]
    wanted = max(0, count - len(odd))
    spread = {hits[i * len(hits) // wanted] for i in range(wanted)} if hits and wanted else set()
    return [checks[i] for i in sorted(odd | spread)]
