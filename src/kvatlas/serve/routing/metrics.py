"""What an operator sees of routing, in Prometheus terms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from kvatlas.errors import RouteError
from kvatlas.observe.distribution import Distribution
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import LabelValues
from kvatlas.route.decision import Decision
from kvatlas.route.outcome import Outcome
from kvatlas.serve.routing.explain import why

ENDPOINTS_MAX = 10_000

_log = get_logger(__name__)

_STAGE_BUCKETS_S = (
    25e-6,
    50e-6,
    100e-6,
    250e-6,
    500e-6,
    1e-3,
    2.5e-3,
    5e-3,
    10e-3,
    25e-3,
    50e-3,
    0.1,
    0.25,
    0.5,
    1.0,
    5.0,
    60.0,
)
_TTFT_BUCKETS_S = (5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class RoutingMetrics:
    """All metrics of one router. Every method costs a few microseconds."""

    def __init__(self, registry: CollectorRegistry, *, log_ends: bool = False) -> None:
        """``log_ends``: write a log line for each request that ended."""
        self._log_ends = log_ends
        self._endpoints = LabelValues(ENDPOINTS_MAX)
        self._kept: dict[tuple[Counter, str, str], Counter] = {}
        """Series of counters by endpoint and something else: looking them up costs more than counting."""
        self._decisions = Counter(
            "kvatlas_route_decisions",
            "Requests sent somewhere, by what their prefix was matched by: events, history, none (nothing held), unknown.",
            ("endpoint", "matched_by"),
            registry=registry,
        )
        self._dropped = Counter("kvatlas_route_dropped", "Requests sent nowhere, by why.", ("reason",), registry=registry)
        self._degraded = Counter(
            "kvatlas_route_without_tokens", "Requests routed without their tokens, by why.", ("reason",), registry=registry
        )
        self._ends = Counter("kvatlas_route_ends", "Requests ended, by how.", ("endpoint", "end"), registry=registry)
        self._retries = Counter("kvatlas_route_retries", "Requests sent again, to another endpoint.", registry=registry)
        self._producers = Counter(
            "kvatlas_route_producer_failures",
            "Times that a data producer failed; routing went on.",
            ("producer",),
            registry=registry,
        )
        self._loads = Counter(
            "kvatlas_route_load_headers",
            "Answers whose headers told their engine's load, by what became of it: taken, unreadable, "
            "left_out (too little, or of one rank of several).",
            ("outcome",),
            registry=registry,
        )
        stages = Distribution(
            "kvatlas_route_stage_seconds",
            "Time before a request is sent, by stage: read, tokens, admission, decide.",
            ("stage",),
            _STAGE_BUCKETS_S,
            registry,
        )
        self._by_stage = [stages.series(stage) for stage in ("read", "tokens", "admission", "decide")]
        text = "From sending a request to its first token."
        self._ttft = Distribution("kvatlas_route_ttft_seconds", text, (), _TTFT_BUCKETS_S, registry).series()
        self._predicted = Counter(
            "kvatlas_route_predicted_cached_tokens",
            "Cached tokens predicted, of requests whose engine told.",
            registry=registry,
        )
        self._actual = Counter("kvatlas_route_actual_cached_tokens", "Cached tokens that engines told.", registry=registry)
        self._error = Distribution(
            "kvatlas_route_prediction_error_tokens",
            "Tokens that a prediction of cached tokens was off, by direction: over, under.",
            ("direction",),
            _TOKEN_BUCKETS,
            registry,
        )
        self._lost = Counter(
            "kvatlas_route_overlap_lost_tokens",
            "Cached tokens given up: held by the best holder and not by who was chosen, for load or another reason.",
            registry=registry,
        )

    def decided(self, decision: Decision) -> None:
        """Count a decision, and the overlap that it gave up."""
        found = decision.first_matches
        if found is None:
            matched_by = "unknown"
        else:
            chosen = found.of(decision.computes_prompt.name)
            matched_by = chosen.source.value if chosen.tokens else "none"
            best = max((match.tokens for match in found.by_endpoint.values()), default=0)
            self._lost.inc(max(0, best - chosen.tokens))
        self._count(self._decisions, decision.target.name, matched_by)

    def stages(self, *seconds: float) -> None:
        """Note how long reading, tokens, admission and deciding took."""
        for stage, value in zip(self._by_stage, seconds, strict=True):
            stage.observe(value)

    def without_tokens(self, reason: str) -> None:
        """Count a request whose tokens were not to be had."""
        self._degraded.labels(reason).inc()

    def dropped(self, error: RouteError) -> None:
        """Count a request that goes nowhere."""
        self._dropped.labels(error.reason or type(error).__name__).inc()

    def producer_failed(self, producer: str, _error: Exception) -> None:
        """Count a failure of a data producer. Names are those of the configuration, and so bounded."""
        self._producers.labels(producer).inc()

    def load_told(self, outcome: str) -> None:
        """Count an answer that told its engine's load: taken, left_out, unreadable."""
        self._loads.labels(outcome).inc()

    def retried(self) -> None:
        self._retries.inc()

    def finished(self, decision: Decision, endpoint: str, outcome: Outcome) -> None:
        """Note how a request went, and how good its prediction was."""
        self._count(self._ends, endpoint, outcome.end.value)
        if outcome.ttft_s is not None:
            self._ttft.observe(outcome.ttft_s)
        predicted = decision.predicted_cached_tokens
        if self._log_ends:
            _log.info(
                "routed",
                request=decision.request.id,
                endpoint=endpoint,
                why=why(decision),
                prompt_tokens=decision.request.prompt_tokens,
                predicted_cached_tokens=predicted,
                cached_tokens=outcome.cached_tokens,
                ttft_s=outcome.ttft_s,
                end=outcome.end.value,
            )
        if outcome.cached_tokens is None or predicted is None or endpoint != decision.target.name:
            return
        self._predicted.inc(predicted)
        self._actual.inc(outcome.cached_tokens)
        direction = "over" if predicted >= outcome.cached_tokens else "under"
        self._error.series(direction).observe(abs(predicted - outcome.cached_tokens))

    def _count(self, counter: Counter, endpoint: str, value: str) -> None:
        series = self._kept.get((counter, endpoint, value))
        if series is None:
            admitted = self._endpoints.admit(endpoint)
            series = counter.labels(admitted, value)
            if admitted == endpoint:
                self._kept[counter, endpoint, value] = series
        series.inc()
