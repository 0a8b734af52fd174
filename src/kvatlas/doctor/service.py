"""A running service, from what it says of itself. No IO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvatlas.doctor.block_size import BlockSizeMatch
from kvatlas.doctor.check import Check, CheckList
from kvatlas.doctor.remedies import SELF_DESCRIBING, replay_setting, stale_remedy
from kvatlas.results import PodStatus

UNANSWERED = ("timeout", "unavailable")
"""Outcomes of replays that an engine did not answer."""


class ServiceState(msgspec.Struct, frozen=True):
    """A service's answers."""

    url: str
    ready: bool
    not_ready_reason: str | None
    block_size_tokens: int
    pods: Sequence[PodStatus]
    metrics: str
    """The text of /metrics."""


def check_service(state: ServiceState) -> list[Check]:
    """Check whether events arrive and are understood, and whether answers can be relied on."""
    found = CheckList(state.url)
    samples = _samples(state.metrics)
    if state.ready:
        found.ok("ready", "it answers, and has caught up with its engines' histories")
    else:
        found.warn("ready", state.not_ready_reason or "not ready", "wait until it has caught up; its log says more")
    cores = [labels["core"] for labels, value in samples.get("kv_cache_core_info", ()) if value == 1]
    found.ok("core", ", ".join(cores) or "not told")
    by_hash = _keys(found, samples)
    _events(found, state, samples)
    _trust(found, state.pods)
    _streams(found, state.pods)
    _replays(found, state.pods, samples)
    _block_sizes(found, state, by_hash)
    _tokens(found, state.pods)
    _decode_errors(found, samples)
    return found.checks


Samples = Mapping[str, Sequence[tuple[Mapping[str, str], float]]]


def _samples(text: str) -> Samples:
    """Return each sample's labels and value, by name."""
    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _events(found: CheckList, state: ServiceState, samples: Samples) -> None:
    kinds: Counter[str] = Counter()
    for labels, value in samples.get("kv_cache_events_received_total", ()):
        kinds[labels.get("type", "?")] += int(value)
    if not state.pods:
        remedy = "let engines publish to its event address, or name them: kvatlas serve --engine tcp://HOST:5557"
        found.warn("events arriving", "no engine was heard of", remedy)
    elif not kinds.total():
        found.warn("events arriving", f"{len(state.pods)} streams, no event yet", "send an engine a request, then look again")
    else:
        ages = [pod.last_event_age_s for pod in state.pods if pod.last_event_age_s is not None]
        last = f"; the last one {min(ages):.1f} s ago" if ages else ""
        found.ok("events arriving", f"{kinds.total()} events ({_counts(kinds)}){last}")


def _trust(found: CheckList, pods: Sequence[PodStatus]) -> None:
    """Being ready says that the service works; this, of how many streams its answers are right."""
    stale = [pod for pod in pods if pod.stale_reason is not None]
    if stale:
        fresh = len(pods) - len(stale)
        seen = f"those about {fresh} of {len(pods)} streams; the others are stale, and what is told of them may be wrong"
        found.warn("answers to rely on", seen, "see each stale stream below")
    elif pods:
        found.ok("answers to rely on", f"none of {len(pods)} streams is stale")


def _streams(found: CheckList, pods: Sequence[PodStatus]) -> None:
    for pod in pods:
        name = f"stream {pod.pod}" + (f" rank {pod.dp_rank}" if pod.dp_rank else "")
        history = f"{pod.blocks} blocks, {pod.gaps} gaps, {pod.replays} replays, {pod.restarts} restarts"
        if pod.stale_reason is not None:
            found.warn(name, f"stale: {pod.stale_reason.value}; {history}", stale_remedy(pod.stale_reason, pod.source))
        elif pod.state == "connecting":
            found.warn(name, f"no event from {pod.source} yet", f"look at it: kvatlas doctor --engine {pod.source}")
        else:
            found.ok(name, f"{pod.state}; {history}")


def _replays(found: CheckList, pods: Sequence[PodStatus], samples: Samples) -> None:
    """Say of which pods the replay endpoint is named but does not answer: gaps are not healed then."""
    failed: Counter[str] = Counter()
    for labels, value in samples.get("kv_cache_replays_total", ()):
        if labels.get("outcome") in UNANSWERED:
            failed[labels.get("pod", "?")] += int(value)
    for name, count in sorted((+failed).items()):
        streams = [pod for pod in pods if pod.pod == name]
        if streams and all(pod.replay_answers for pod in streams):
            continue  # it answers again
        setting = " or ".join(sorted({replay_setting(pod.source) for pod in streams})) or "its address in the settings"
        remedy = f'check {setting}, and "replay_endpoint" in the engine\'s events config; until it answers no gap is healed'
        found.warn(f"replay {name}", f"its replay endpoint does not answer: {count} replays failed", remedy)


def _keys(found: CheckList, samples: Samples) -> bool:
    """Say of which kind its keys are; return whether they are engine hashes."""
    kinds = [labels for labels, value in samples.get("kv_cache_keys_info", ()) if value == 1]
    if not kinds:
        found.ok("keys", "not told")
        return False
    labels = kinds[0]
    algorithm = f" ({labels['algorithm']})" if labels.get("algorithm") else ""
    found.ok("keys", f"keys.mode {labels['mode']}{algorithm}, blocks of {labels['block_size']} tokens")
    return labels["mode"] == "engine"


def _block_sizes(found: CheckList, state: ServiceState, by_hash: bool) -> None:
    sizes = {size for pod in state.pods for size in pod.block_sizes_tokens}
    if not sizes:
        found.skip("block size", f"index {state.block_size_tokens}; no engine has told its own yet")
        return
    match = BlockSizeMatch(state.block_size_tokens, frozenset(sizes))
    (match.report_for_hashes if by_hash else match.report)(found)


def _tokens(found: CheckList, pods: Sequence[PodStatus]) -> None:
    unknown = sum(pod.orphans for pod in pods)
    held = sum(pod.blocks for pod in pods)
    if unknown:
        found.warn("tokens known", f"of {unknown} of {held} resident blocks no event has told the tokens", SELF_DESCRIBING)
    elif held:
        found.ok("tokens known", f"of all {held} resident blocks")


def _decode_errors(found: CheckList, samples: Samples) -> None:
    reasons: Counter[str] = Counter()
    for labels, value in samples.get("kv_cache_decode_errors_total", ()):
        reasons[labels.get("reason", "?")] += int(value)
    unknown = reasons.pop("unknown_event", 0)
    if reasons.total():
        remedy = "see its log for the frames; set the engine's decoder (zmq.engines[].decoder)"
        found.fail("events understood", f"lost: {_counts(reasons)}", remedy)
    elif unknown:
        found.warn("events understood", f"{unknown} of unknown types: nothing is lost", "a newer kvatlas may know them")
    else:
        found.ok("events understood", "all")


def _counts(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))
