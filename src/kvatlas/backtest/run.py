"""Recorded events applied in order of time, and each recorded request predicted from those received before it was sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from kvatlas.backtest.captures import Captures
from kvatlas.backtest.follow import StreamFollower
from kvatlas.backtest.requests import RecordedRequest
from kvatlas.config import Config, KeySettings
from kvatlas.errors import RequestError
from kvatlas.indexer import Indexer
from kvatlas.ingest.apply import Applied, Applier
from kvatlas.ingest.decode import load_decoder
from kvatlas.results import Query
from kvatlas.types import DpRank, Frame, PodId, StaleReason, Stream


class Prediction(msgspec.Struct, frozen=True):
    """What the index knew when a request was sent."""

    request: RecordedRequest
    prompt_tokens: int
    predicted_cached_tokens: Mapping[PodId, int]
    """By pod, of its best rank; every pod of the captures is there, those not heard of yet with 0."""
    predicted_by_rank: Mapping[PodId, Mapping[DpRank, int]]
    """Of pods with more than one rank."""
    stale: Mapping[PodId, StaleReason]
    exact: bool | None
    """Whether the engine said the same; None where it said nothing, or it is not known which of several engines served."""


class Summary(msgspec.Struct, frozen=True):
    """What a run came to."""

    files: int
    streams: tuple[str, ...]
    frames: int
    duplicates: int
    gaps: int
    frames_missed: int
    restarts: int
    events: Mapping[str, int]
    """By type."""
    decode_faults_by_reason: Mapping[str, int]
    """Events lost because they could not be read."""
    unknown_events: int
    """Events of types that this version does not know; nothing is lost with them."""
    removals_unknown: int
    """Removals of blocks that were not held."""
    orphans: int
    """Blocks whose tokens were never told: held at the end, or given up."""
    requests: int
    compared: int
    exact: int
    compared_but_after_reset: int
    """Compared requests less each first one after a reset, whose clear the engine publishes one step late."""
    exact_but_after_reset: int

    @property
    def decode_faults(self) -> int:
        """Events lost because they could not be read, for any reason."""
        return sum(self.decode_faults_by_reason.values())

    @property
    def unexplained_hashes(self) -> int:
        """Removals of blocks never seen, and blocks whose tokens never came."""
        return self.removals_unknown + self.orphans


class Backtest:
    """One run over captures, on an index of its own. Time in it is the captures' time."""

    def __init__(self, captures: Captures, *, block_size_tokens: int = 16, decoder: str = "vllm") -> None:
        self._captures = captures
        self._decoder = load_decoder(decoder)
        self._now_s = 0.0
        config = Config(keys=KeySettings(block_size=block_size_tokens))
        self._indexer = Indexer(config, clock=lambda: self._now_s)
        self._index = self._indexer.index
        metrics = self._indexer.metrics
        applier = Applier(self._index, metrics)
        self._followers = {stream: StreamFollower(stream, self._index, applier, metrics) for stream in sorted(captures.models)}
        self._frames = 0
        self._applied = Applied()
        self._predictions: Counter[str] = Counter()

    def run(self, requests: Sequence[RecordedRequest] = ()) -> Iterator[Prediction]:
        """Apply all frames; yield a prediction for each request (they are in order of time) as its time comes."""
        frames = iter(self._captures)
        pending = next(frames, None)
        for request in requests:
            while pending is not None and pending[1].received_ns < request.sent_s * 1e9:
                self._take(*pending)
                pending = next(frames, None)
            self._now_s = max(self._now_s, request.sent_s)
            yield self._predict(request)
        while pending is not None:
            self._take(*pending)
            pending = next(frames, None)

    def summary(self) -> Summary:
        """Return what the run came to so far."""
        followers = self._followers.values()
        return Summary(
            files=len(self._captures.paths),
            streams=tuple(str(stream) for stream in self._followers),
            frames=self._frames,
            duplicates=sum(follower.duplicates for follower in followers),
            gaps=sum(follower.gaps for follower in followers),
            frames_missed=sum(follower.frames_missed for follower in followers),
            restarts=sum(follower.restarts for follower in followers),
            events=dict(sorted(self._applied.events.items())),
            decode_faults_by_reason=dict(sorted(self._applied.faults.items())),
            unknown_events=self._applied.unknown_events,
            removals_unknown=self._applied.report.removed_unknown,
            orphans=self._index.stats().orphans + self._applied.report.orphans_dropped,
            requests=self._predictions["requests"],
            compared=self._predictions["compared"],
            exact=self._predictions["exact"],
            compared_but_after_reset=self._predictions["compared"] - self._predictions["compared_after_reset"],
            exact_but_after_reset=self._predictions["exact"] - self._predictions["exact_after_reset"],
        )

    # -- events -------------------------------------------------------------------------------------------------------

    def _take(self, stream: Stream, frame: Frame) -> None:
        self._frames += 1
        self._now_s = max(self._now_s, frame.received_ns / 1e9)
        self._applied.add(self._followers[stream].take(frame, self._decoder, self._captures.models[stream]))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _predict(self, request: RecordedRequest) -> Prediction:
        result = self._indexer.score(self._query(request))
        pods = sorted(result.pods, key=lambda pod: pod.pod)
        prediction = Prediction(
            request=request,
            prompt_tokens=result.prompt_tokens,
            predicted_cached_tokens={pod.pod: pod.predicted_cached_tokens for pod in pods},
            predicted_by_rank={pod.pod: pod.predicted_by_rank for pod in pods if len(pod.predicted_by_rank) > 1},
            stale={pod.pod: pod.stale_reason for pod in pods if pod.stale_reason is not None},
            exact=_is_exact(request, {pod.pod: pod.predicted_by_rank for pod in pods}),
        )
        self._predictions["requests"] += 1
        if prediction.exact is not None:
            for kind in ("compared", "exact") if prediction.exact else ("compared",):
                self._predictions[kind] += 1
                self._predictions[f"{kind}_after_reset"] += request.after_reset
        return prediction

    def _query(self, request: RecordedRequest) -> Query:
        """A model that no topic names is an adapter of the captures' model."""
        models = self._captures.model_names()
        if request.model in models:
            return Query(request.token_ids, request.model or "", cache_salt=request.cache_salt)
        if request.model is None and len(models) > 1:
            problem = f"names no model, and the captures are of {', '.join(sorted(models))}"
            raise RequestError(request.where, problem, 'add "model" to the record')
        base = next(iter(sorted(models)), "")
        return Query(request.token_ids, base, lora_name=request.model, cache_salt=request.cache_salt)


def _is_exact(request: RecordedRequest, predicted: Mapping[PodId, Mapping[DpRank, int]]) -> bool | None:
    """Compare with the engine that served, which must be the only one or be named by the request."""
    if request.cached_tokens is None:
        return None
    pod = request.pod or (next(iter(predicted)) if len(predicted) == 1 else None)
    by_rank = predicted.get(pod, {}) if pod is not None else {}
    if request.dp_rank is None and len(by_rank) != 1:
        return None
    rank = next(iter(by_rank)) if request.dp_rank is None else request.dp_rank
    return by_rank[rank] == request.cached_tokens if rank in by_rank else None
