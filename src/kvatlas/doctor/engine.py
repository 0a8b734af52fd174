"""One engine (one rank), from a sample of its events. No IO."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from kvatlas.doctor.block_size import BlockSizeMatch
from kvatlas.doctor.check import Check, CheckList
from kvatlas.doctor.hashing import ExpectedKeys, check_hashes
from kvatlas.doctor.remedies import EVENTS_CONFIG, SELF_DESCRIBING
from kvatlas.doctor.sample import EngineSample
from kvatlas.ingest.topic import parse_topic

LAG_WARN_S = 2.0


class EngineExpectations(msgspec.Struct, frozen=True):
    """What the engine is held against."""

    block_size_tokens: int = 16
    topic_filter: str = "kv@"
    keys: ExpectedKeys = ExpectedKeys()
    seeds: Sequence[str] = ()
    """Values of PYTHONHASHSEED to try beside the common ones."""
    duration_s: float = 5.0
    """How long was listened."""


def check_engine(sample: EngineSample, expected: EngineExpectations) -> list[Check]:
    """Check whether events arrive, in order and readable, and whether they say all that the index needs."""
    found = CheckList(sample.heard.engine.endpoint)
    _arriving(found, sample, expected.duration_s)
    _replay(found, sample)
    if not sample.frames:
        for name in ("topic", "events understood", "sequence numbers", "block size", "engine hashes", "offload events"):
            found.skip(name, "no event to look at")
        return found.checks
    _topic(found, sample, expected.topic_filter)
    _understood(found, sample)
    _sequence(found, sample)
    _rank(found, sample)
    _block_size(found, sample, expected)
    _hashes(found, sample, expected)
    _offload(found, sample, by_hash=expected.keys.scheme is not None)
    return found.checks


def _arriving(found: CheckList, sample: EngineSample, duration_s: float) -> None:
    name = "events arriving"
    heard = sample.heard
    if not heard.connected and not sample.frames:
        found.fail(name, "nothing answers at this address", f"check host, port and firewall; start vLLM with {EVENTS_CONFIG}")
    elif heard.malformed:
        found.fail(name, f"{heard.malformed} messages are no event frames", "is this the port of an engine's KV events?")
    elif not heard.live_frames:
        kept = f" ({heard.kept_frames} kept from before)" if heard.kept_frames else ""
        remedy = "an idle engine sends nothing: send it a request meanwhile, or listen longer with --duration"
        (found.ok if kept else found.warn)(name, f"connected; nothing new within {duration_s:g} s{kept}", remedy)
    else:
        lag_s = statistics.median(sample.lags_s) if sample.lags_s else None
        seen = f"{heard.live_frames} frames within {duration_s:g} s"
        if lag_s is None:
            found.ok(name, f"{seen}; they tell no time")
        elif abs(lag_s) > LAG_WARN_S:
            found.warn(
                name, f"{seen}, {lag_s:.1f} s after the engine's clock", "set both clocks by NTP, or look for a slow link"
            )
        else:
            found.ok(name, f"{seen}, {lag_s * 1e3:.1f} ms after the engine's clock (median)")


def _replay(found: CheckList, sample: EngineSample) -> None:
    endpoint = sample.heard.engine.replay_endpoint
    if endpoint is None:
        remedy = (
            "name it: --engine tcp://...,replay=tcp://... and zmq.engines[].replayEndpoint (zmq.replayEndpoint where engines "
            "connect to kvatlas); without it a lost event is lost"
        )
        found.warn("replay", "no replay endpoint was named", remedy)
    elif not (sample.heard.replay_answered or (sample.heard.replay_answered is None and sample.heard.kept_frames)):
        if sample.replay_reached:
            seen = f"{endpoint} answers, but what it keeps did not come in the time given"
            found.warn("replay", seen, "listen longer with --duration")
        else:
            remedy = 'check the address; set "replay_endpoint" in the engine\'s events config'
            found.fail("replay", f"{endpoint} does not answer", remedy)
    elif sample.heard.kept_frames and sample.first_seq:
        remedy = "raise buffer_steps in the engine's events config; a kvatlas that starts now knows only what comes from here"
        found.warn("replay", f"keeps {sample.heard.kept_frames} frames, none before number {sample.first_seq}", remedy)
    elif sample.heard.kept_frames:
        found.ok("replay", f"answers with {sample.heard.kept_frames} frames, from the engine's first one on")
    else:
        found.ok("replay", "answers; the engine has published nothing so far")


def _topic(found: CheckList, sample: EngineSample, topic_filter: str) -> None:
    topic = sample.topics.most_common(1)[0][0]
    pod, model = parse_topic(topic)
    named = sample.settings
    if not topic.startswith(topic_filter):
        remedy = f'set "topic" in the engine\'s events config to {topic_filter}HOST:PORT@MODEL, or zmq.topicFilter to fit'
        found.fail("topic", f"{topic!r:.100} does not begin with zmq.topicFilter ({topic_filter!r}): kvatlas drops it", remedy)
    elif (pod or (named and named.pod)) and (model or (named and named.model)):
        found.ok("topic", f"{topic!r:.100}")
    else:
        remedy = "use kv@HOST:PORT@MODEL, or name pod and model with --engine tcp://...,pod=...,model=..."
        found.warn("topic", f"{topic!r:.100} does not name pod and model", remedy)


def _understood(found: CheckList, sample: EngineSample) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(sample.events.items())) or "no event in them"
    if sample.faults:
        lost = ", ".join(f"{reason} {count}" for reason, count in sorted(sample.faults.items()))
        found.fail("events understood", f"lost: {lost}", "use the engine's decoder: zmq.engines[].decoder (vllm, sglang, ...)")
    elif sample.unknown_events:
        seen = f"{sample.unknown_events.total()} of unknown types beside {kinds}: nothing is lost"
        found.warn("events understood", seen, "a newer kvatlas may know them")
    else:
        found.ok("events understood", f"{sample.frames} frames: {kinds}")


def _sequence(found: CheckList, sample: EngineSample) -> None:
    seen = f"{sample.gaps} gaps ({sample.frames_missed} frames), {sample.duplicates} repeated, {sample.restarts} restarts"
    if sample.gaps:
        remedy = (
            'raise "hwm" in the engine\'s events config, and look at the network; with a replay endpoint kvatlas heals gaps'
        )
        found.warn("sequence numbers", seen, remedy)
    elif sample.restarts:
        found.warn("sequence numbers", seen, "the engine restarted, or two engines publish to one address")
    else:
        found.ok("sequence numbers", f"without a gap from {sample.first_seq}")


def _rank(found: CheckList, sample: EngineSample) -> None:
    ranks = sorted(rank for rank in sample.ranks if rank is not None)
    several = sample.settings is not None and sample.settings.dp_ranks > 1
    if ranks:
        found.ok("data-parallel rank", f"in the events: {', '.join(map(str, ranks))}")
    elif several:
        found.ok("data-parallel rank", "not in the events: kvatlas takes it from the port")
    else:
        found.ok("data-parallel rank", "not in the events: fine without data parallelism (else set dpRanks)")


def _block_size(found: CheckList, sample: EngineSample, expected: EngineExpectations) -> None:
    if not sample.block_sizes:
        found.skip("block size", "no stored event has told it", "send the engine a request meanwhile")
    elif expected.keys.scheme is not None:
        BlockSizeMatch(expected.block_size_tokens, _group_sizes(sample)).report_for_hashes(found)
    else:
        sizes = frozenset().union(*sample.block_sizes.values())
        BlockSizeMatch(expected.block_size_tokens, sizes).report(found)


def _hashes(found: CheckList, sample: EngineSample, expected: EngineExpectations) -> None:
    sizes = _group_sizes(sample)
    (size,) = sizes if len(sizes) == 1 else (None,)
    check_hashes(found, sample.blocks, expected.keys, expected.seeds, size)


def _group_sizes(sample: EngineSample) -> frozenset[int]:
    """Return the block size of each attention group. A smaller block in it is the beginning of one, cached by itself."""
    return frozenset(max(sizes) for sizes in sample.block_sizes.values())


def _offload(found: CheckList, sample: EngineSample, *, by_hash: bool) -> None:
    if not sample.offloaded:
        found.skip("offload events", "none seen: nothing is offloaded, or nothing was meanwhile")
        return
    seen = "; ".join(
        f"{tier}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        for tier, kinds in sorted(sample.offloaded.items())
    )
    if by_hash:
        found.ok("offload events", f"{seen}: understood by their hashes alone (keys.mode: engine)")
    elif any(kinds["placeholders"] for kinds in sample.offloaded.values()):
        found.warn("offload events", seen, SELF_DESCRIBING)
    else:
        found.ok("offload events", f"{seen}: they explain themselves")
