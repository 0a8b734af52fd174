"""From facts to problems: what is wrong, what it means, what to do. No IO, no clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from kvatlas.doctor.block_size import BlockSizeMatch
from kvatlas.doctor.check import Check, CheckList, Outcome
from kvatlas.doctor.engine import LAG_WARN_S
from kvatlas.doctor.remedies import EVENTS_CONFIG, SELF_DESCRIBING, replay_setting, stale_remedy
from kvatlas.index.choice import REMEDY as CORE_REMEDY
from kvatlas.serve.dashboard.state import SILENT, EngineRow, Facts, Problem
from kvatlas.serve.routing.remedies import remedy as tokens_remedy
from kvatlas.types import StaleReason

NAMED_MAX = 5
TRAFFIC_MIN = 10
"""Requests sent to an engine after which it should have said something."""
LAG_AGE_S_MAX = 60.0
"""How old the last event may be for its lag to say something of now."""
ORPHANS_SHARE = 0.1
TOLD_MIN = 20
"""Requests whose engines told cached tokens, before predictions are judged."""
OFF_SHARE = 0.2
OFF_TOKENS_MIN = 1_000
QUEUE_SHARE = 0.5
SEVERITIES = ("error", "warning", "info")

_STALE = {
    StaleReason.GAP: ("warning", "Events were lost", "Blocks may be counted that the engine has evicted."),
    StaleReason.QUEUE_FULL: ("warning", "Events come faster than they are applied", "What is known of the engine is old."),
    StaleReason.DECODE_ERROR: ("error", "Events cannot be read", "What they said is not in the index."),
    StaleReason.DISCONNECTED: ("error", "An engine's events cannot be reached", "What is known of it is from before."),
    StaleReason.HISTORY_INCOMPLETE: (
        "warning",
        "Events from before the connection are missing",
        "The engine holds more than is counted.",
    ),
    StaleReason.RESYNCING: ("info", "An engine's history is being fetched", "It may hold more than is counted, for a moment."),
}

_HEALTH = {
    "failing": ("Requests to an endpoint fail", "Several failed in a row: it gets no requests until a trial goes well."),
    "trial": ("An endpoint is tried again", "Requests to it failed; one is sent to see whether it works again."),
    "unreachable": ("An endpoint cannot be reached", "Its metrics cannot be fetched: it gets no requests until they can."),
}


def problems_of(facts: Facts) -> list[Problem]:
    """Return what is wrong, the worst first. ``since_s`` is left at 0: see :class:`SinceWhen`."""
    found = [problem for look in LOOKS for problem in look(facts)]
    return sorted(found, key=lambda problem: (SEVERITIES.index(problem.severity), problem.id))


class SinceWhen:
    """Remembers when each problem was first seen, as long as it lasts."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def dated(self, problems: Iterable[Problem], now_s: float) -> tuple[Problem, ...]:
        """Return problems with the time when they began. ``now_s``: since the epoch."""
        now = list(problems)
        self._since_s = {problem.id: self._since_s.get(problem.id, now_s) for problem in now}
        return tuple(msgspec.structs.replace(problem, since_s=self._since_s[problem.id]) for problem in now)


def _problem(name: str, severity: str, title: str, meaning: str, remedy: str, rows: Sequence[EngineRow] = ()) -> Problem:
    named = tuple(row.name for row in rows[:NAMED_MAX])
    return Problem(
        id=name, severity=severity, title=title, meaning=meaning, remedy=remedy, engines=named, engines_count=len(rows)
    )


def _nobody(facts: Facts) -> Iterator[Problem]:
    if not facts.rows:
        yield _problem(
            "nobody",
            "warning",
            "No engine was heard of",
            "No event stream and no endpoint is known: nothing can be found.",
            f"let engines publish to the event address, or name them (zmq.engines, route.endpoints). vLLM: {EVENTS_CONFIG}",
        )


def _not_ready(facts: Facts) -> Iterator[Problem]:
    if not facts.ready and facts.rows:
        yield _problem(
            "not-ready", "info", "Catching up", facts.not_ready_reason, "wait; if it lasts, the service's log says more"
        )


def _stale(facts: Facts) -> Iterator[Problem]:
    by_reason: dict[StaleReason, list[EngineRow]] = defaultdict(list)
    for row in facts.rows:
        if row.stale_reason is not None:
            by_reason[row.stale_reason].append(row)
    for reason, rows in by_reason.items():
        severity, title, meaning = _STALE[reason]
        yield _problem(f"stale-{reason.value}", severity, title, meaning, stale_remedy(reason, rows[0].source), rows)


def _no_events(facts: Facts) -> Iterator[Problem]:
    quiet = [row for row in facts.rows if row.state in (SILENT, "connecting")]
    served = [row for row in quiet if row.sent >= TRAFFIC_MIN]
    waiting = [row for row in quiet if row.state == "connecting" and row.sent < TRAFFIC_MIN]
    if served and len(served) == len(facts.rows) and not facts.service.engines_named:
        yield _problem(
            "no-events",
            "info",
            "No engine sends events",
            "Requests are routed by what was routed before: right as long as engines evict little.",
            f"for exact matches name their event ports (zmq.engines). vLLM: {EVENTS_CONFIG}",
            served,
        )
    elif served:
        yield _problem(
            "no-events",
            "error",
            "An engine gets requests and sends no events",
            "What it holds is not known: requests go there by load and history only.",
            f"check its event port and its topic, with kvatlas doctor --engine. vLLM: {EVENTS_CONFIG}",
            served,
        )
    if waiting:
        yield _problem(
            "connecting",
            "info",
            "No event yet",
            "The event port is named, and has said nothing so far. An idle engine is silent.",
            "send it a request; if it stays silent: kvatlas doctor --engine",
            waiting,
        )


def _block_sizes(facts: Facts) -> Iterator[Problem]:
    by_sizes: dict[frozenset[int], list[EngineRow]] = defaultdict(list)
    for row in facts.rows:
        by_sizes[frozenset(row.block_sizes_tokens)].append(row)
    for sizes, rows in by_sizes.items():
        if not sizes:
            continue
        found = CheckList("")
        match = BlockSizeMatch(facts.service.block_size_tokens, sizes)
        (match.report_for_hashes if facts.service.keys_mode == "engine" else match.report)(found)
        for check in found.checks:
            if check.outcome is not Outcome.OK:
                yield _from_check(
                    f"block-size-{'-'.join(map(str, sorted(sizes)))}", "Block sizes do not go together", check, rows
                )


def _from_check(name: str, title: str, check: Check, rows: Sequence[EngineRow]) -> Problem:
    severity = "error" if check.outcome is Outcome.FAIL else "warning"
    return _problem(name, severity, title, f"{check.seen}.", check.remedy or "", rows)


def _predictions(facts: Facts) -> Iterator[Problem]:
    """Predicted and actual cached tokens apart. All too few where keys are engines' hashes: they are others than ours."""
    grown = facts.grown
    predicted, actual = grown.get("predicted_tokens", 0.0), grown.get("actual_tokens", 0.0)
    over, under = grown.get("over_tokens", 0.0), grown.get("under_tokens", 0.0)
    apart = over + under
    if grown.get("told", 0.0) < TOLD_MIN or apart < max(OFF_TOKENS_MIN, OFF_SHARE * max(predicted, actual)):
        return
    seen = f"Of late {predicted:,.0f} cached tokens were predicted, and engines told {actual:,.0f}."
    if facts.service.keys_mode == "engine" and predicted < OFF_SHARE * actual:
        yield _problem(
            "hash-mismatch",
            "error",
            "Engines hash blocks in another way",
            f"{seen} Keys are the engines' hashes (keys.mode engine), and prompts do not lead to them.",
            "kvatlas doctor --engine says algorithm and seed: set keys.engine.algorithm and keys.engine.seed, and "
            "PYTHONHASHSEED on engines; or set keys.mode: kvatlas",
        )
    elif under > over:
        yield _problem(
            "predicted-too-little",
            "warning",
            "Engines find more cached than was predicted",
            f"{seen} Prefixes are there that are not seen: requests may go where nothing is cached.",
            "look for missing events; compare tokens with the engine's (kvatlas doctor): model, chat template, block size",
        )
    else:
        yield _problem(
            "predicted-too-much",
            "warning",
            "Engines find less cached than was predicted",
            f"{seen} Requests go where their prefix is no more.",
            "look for stale engines; without events, let engines publish them: history does not see evictions",
        )


def _faults(facts: Facts) -> Iterator[Problem]:
    reasons = _named(facts, "fault.")
    unknown = reasons.pop("unknown_event", 0.0)
    if reasons:
        yield _problem(
            "faults",
            "error",
            "Events are not understood",
            f"Lost of late: {_counts(reasons)}.",
            "see the log for the frames; set the engine's decoder (zmq.engines[].decoder)",
        )
    if unknown:
        yield _problem(
            "unknown-events",
            "info",
            "Events of unknown types",
            f"{unknown:,.0f} of late: nothing is lost.",
            "a newer kvatlas may know them",
        )


def _lag(facts: Facts) -> Iterator[Problem]:
    late = [row for row in facts.rows if _lag_now_s(row) > LAG_WARN_S]
    late.sort(key=_lag_now_s, reverse=True)
    if late:
        yield _problem(
            "lag",
            "warning",
            "Events come late",
            f"Up to {_lag_now_s(late[0]):.1f} s after the engine's clock: decisions are made on what was.",
            "set both clocks by NTP; else look at the network, and at this service's CPU",
            late,
        )


def _lag_now_s(row: EngineRow) -> float:
    """Return the lag of an engine's last event; 0 where that is too old to say something of now."""
    if row.lag_s is None or row.event_age_s is None or row.event_age_s - row.lag_s > LAG_AGE_S_MAX:
        return 0.0
    return row.lag_s


def _queues(facts: Facts) -> Iterator[Problem]:
    full = [row for row in facts.rows if row.queue_depth > QUEUE_SHARE * facts.limits.queue_frames]
    if full:
        yield _problem(
            "queue",
            "warning",
            "Events wait to be applied",
            "More than half of a stream's queue is full; beyond it the stream has to be fetched again.",
            "raise ingest.queueFrames, or give the service more CPU",
            full,
        )


def _replays(facts: Facts) -> Iterator[Problem]:
    mute = [row for row in facts.rows if row.replay_answers is False]
    if mute:
        yield _problem(
            "replay",
            "warning",
            "A replay failed",
            f"{mute[0].name}: {mute[0].replay_problem or 'no answer'}. Until one succeeds, no gap is healed, and a restart"
            " of this service begins with an empty index.",
            f'check {replay_setting(mute[0].source)}, and "replay_endpoint" in the engine\'s events config; where frames are'
            ' missing, raise "buffer_steps" there, and restart the engine if its stream stays stale',
            mute,
        )


def _gaps(facts: Facts) -> Iterator[Problem]:
    gaps = facts.grown.get("gaps", 0.0)
    if gaps > 0:
        yield _problem(
            "gaps",
            "info",
            "Events went missing on their way",
            f"Gaps of late: {gaps:,.0f}. Engines that are not stale were healed by a replay.",
            'raise "hwm" in the engine\'s events config, and look at the network',
            [row for row in facts.rows if row.gaps],
        )


def _orphans(facts: Facts) -> Iterator[Problem]:
    # of a stream that lost events they are no wonder
    blind = [row for row in facts.rows if row.state == "fresh" and row.orphans > ORPHANS_SHARE * row.blocks > 0]
    if blind:
        yield _problem(
            "orphans",
            "warning",
            "Blocks whose tokens no event has told",
            "They are held, and no prompt finds them.",
            SELF_DESCRIBING,
            blind,
        )


def _bounds(facts: Facts) -> Iterator[Problem]:
    for bound, setting in (("size", "index.maxSize"), ("bytes", "index.maxBytes")):
        evicted = facts.grown.get(f"evicted.{bound}", 0.0)
        if evicted > 0:
            yield _problem(
                f"bound-{bound}",
                "warning",
                "The index is at its bound",
                f"{evicted:,.0f} blocks that engines still hold were given up of late.",
                f"raise {setting}; docs/native-core.md says what a block costs",
            )


def _tokens(facts: Facts) -> Iterator[Problem]:
    reasons = _named(facts, "untold.")
    for reason, count in sorted(reasons.items()):
        yield _problem(
            f"tokens-{reason}",
            "warning",
            "Requests without their tokens",
            f"{count:,.0f} of late ({reason.replace('_', ' ')}): routed by load and history only.",
            tokens_remedy(reason) or "see the service's log",
        )


def _health(facts: Facts) -> Iterator[Problem]:
    for state, (title, meaning) in _HEALTH.items():
        rows = [row for row in facts.rows if row.health == state]
        if rows:
            severity = "info" if state == "trial" else "error"
            yield _problem(f"health-{state}", severity, title, meaning, "see the engine's log, and that it runs", rows)


def _process(facts: Facts) -> Iterator[Problem]:
    service = facts.service
    if service.core_problem is not None:
        yield _problem(
            "core",
            "warning",
            "The native core is missing",
            f"The Python reference does the work, many times slower: {service.core_problem}.",
            CORE_REMEDY,
        )
    if service.worker_starts > 1:
        yield _problem(
            "worker",
            "warning",
            "This worker process died",
            f"It was started {service.worker_starts} times; what it knew of requests before is gone.",
            "see the log for why",
        )


def _named(facts: Facts, prefix: str) -> dict[str, float]:
    """Return by how much the counters grew whose names begin so."""
    grown = ((name, count) for name, count in facts.grown.items() if name.startswith(prefix) and count > 0)
    return {name.removeprefix(prefix): count for name, count in grown}


def _counts(reasons: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:,.0f}" for name, count in sorted(reasons.items()))


LOOKS: tuple[Callable[[Facts], Iterator[Problem]], ...] = (
    _nobody,
    _not_ready,
    _stale,
    _no_events,
    _block_sizes,
    _predictions,
    _faults,
    _lag,
    _queues,
    _replays,
    _gaps,
    _orphans,
    _bounds,
    _tokens,
    _health,
    _process,
)
