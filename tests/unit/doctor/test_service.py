"""What the doctor says of a service, from its own answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.doctor import Check, ServiceState, check_installation, check_service
from kvatlas.observe.metrics import Metrics
from kvatlas.results import PodStatus
from kvatlas.types import DpRank, PodId, StaleReason

FRESH = PodStatus(
    pod=PodId("10.0.0.7:8000"),
    dp_rank=DpRank(0),
    model="llama",
    state="fresh",
    stale_reason=None,
    blocks=40,
    orphans=0,
    block_sizes_tokens=(32,),
    groups={},
    next_seq=7,
    queue_depth=0,
    gaps=0,
    replays=0,
    replay_answers=None,
    restarts=0,
    last_event_age_s=3.0,
    source="tcp://10.0.0.7:5557",
)


def diagnose(*pods: PodStatus, metrics: Metrics | None = None, **state: Any) -> dict[str, Check]:
    if metrics is None:
        metrics = Metrics(core="reference")
        metrics.events("10.0.0.7:8000", "BlockStored", 5)
    given = {"url": "http://kvatlas:8080", "ready": True, "not_ready_reason": None, "block_size_tokens": 16, **state}
    return {check.name: check for check in check_service(ServiceState(pods=pods, metrics=metrics.render().decode(), **given))}


def outcomes(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.outcome.value for name, check in checks.items()}


def changed(**fields: Any) -> PodStatus:
    return msgspec.structs.replace(FRESH, **fields)


def test_a_healthy_service_passes_every_check() -> None:
    checks = diagnose(FRESH)
    assert set(outcomes(checks).values()) == {"ok"}
    assert "BlockStored 5" in checks["events arriving"].seen
    assert checks["core"].seen == "reference"


def test_a_service_without_engines_is_a_warning() -> None:
    checks = diagnose(metrics=Metrics())
    assert outcomes(checks)["events arriving"] == "warn"
    assert "--engine" in (checks["events arriving"].remedy or "")


@pytest.mark.parametrize("reason", list(StaleReason))
def test_every_reason_to_be_stale_comes_with_what_to_do(reason: StaleReason) -> None:
    check = diagnose(changed(state="stale", stale_reason=reason))["stream 10.0.0.7:8000"]
    assert (check.outcome.value, reason.value in check.seen) == ("warn", True)
    assert check.remedy


def test_being_ready_and_being_right_are_told_apart() -> None:
    checks = diagnose(FRESH, changed(pod=PodId("b"), state="stale", stale_reason=StaleReason.GAP))
    assert outcomes(checks)["ready"] == "ok"
    assert "relied on" not in checks["ready"].seen
    assert outcomes(checks)["answers to rely on"] == "warn"
    assert "1 of 2 streams" in checks["answers to rely on"].seen
    assert outcomes(diagnose(FRESH))["answers to rely on"] == "ok"


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("tcp://10.0.0.7:5557", "zmq.engines[].replayEndpoint"),
        ("tcp://*:5557 from 10.0.0.7", "zmq.replayEndpoint"),
        ("ipc:///run/kvatlas.sock", "zmq.replayEndpoint"),
    ],
)
@pytest.mark.parametrize("reason", [StaleReason.GAP, StaleReason.HISTORY_INCOMPLETE])
def test_the_replay_setting_named_is_the_one_of_the_streams_mode(reason: StaleReason, source: str, setting: str) -> None:
    check = diagnose(changed(state="stale", stale_reason=reason, source=source))["stream 10.0.0.7:8000"]
    assert f"({setting})" in (check.remedy or "")


@pytest.mark.parametrize("outcome", ["timeout", "unavailable"])
def test_replays_without_an_answer_are_a_warning_until_one_is_answered(outcome: str) -> None:
    metrics = Metrics()
    metrics.replay("10.0.0.7:8000", outcome, 0)
    check = diagnose(changed(source="tcp://*:5557 from 10.0.0.7", replay_answers=False), metrics=metrics)[
        "replay 10.0.0.7:8000"
    ]
    assert check.outcome.value == "warn"
    assert "does not answer" in check.seen
    assert "check zmq.replayEndpoint" in (check.remedy or "")
    assert "replay 10.0.0.7:8000" not in diagnose(changed(replay_answers=True), metrics=metrics)


def test_an_engine_that_was_never_heard_is_a_warning() -> None:
    check = diagnose(changed(state="connecting", blocks=0))["stream 10.0.0.7:8000"]
    assert check.outcome.value == "warn"
    assert "kvatlas doctor --engine tcp://10.0.0.7:5557" in (check.remedy or "")


def test_block_sizes_are_held_against_the_services_own() -> None:
    assert outcomes(diagnose(FRESH, block_size_tokens=64))["block size"] == "warn"
    assert outcomes(diagnose(changed(block_sizes_tokens=())))["block size"] == "skip"


def test_blocks_without_tokens_are_a_warning() -> None:
    check = diagnose(changed(orphans=4))["tokens known"]
    assert check.outcome.value == "warn"
    assert "self_describing_kv_events" in (check.remedy or "")


def test_decode_errors_fail_and_unknown_events_warn() -> None:
    metrics = Metrics()
    metrics.decode_fault("10.0.0.7:8000", "unknown_event")
    assert outcomes(diagnose(FRESH, metrics=metrics))["events understood"] == "warn"
    metrics.decode_fault("10.0.0.7:8000", "bad_hash")
    check = diagnose(FRESH, metrics=metrics)["events understood"]
    assert (check.outcome.value, check.seen) == ("fail", "lost: bad_hash 1")


def test_a_service_that_is_catching_up_is_not_ready() -> None:
    check = diagnose(FRESH, ready=False, not_ready_reason="1 streams are catching up")["ready"]
    assert (check.outcome.value, check.seen) == ("warn", "1 streams are catching up")


def test_this_installation_is_sound_and_names_its_core() -> None:
    checks = {check.name: check for check in check_installation("reference")}
    assert set(outcomes(checks).values()) == {"ok"}
    assert checks["core"].seen.startswith("reference")
    assert checks["decoders"].seen == "generic, sglang, vllm"


def test_where_keys_are_engine_hashes_the_block_size_has_to_be_the_engines() -> None:
    metrics = Metrics()
    metrics.keys("engine", "sha256_cbor", 16)
    found = diagnose(FRESH, metrics=metrics)
    assert "sha256_cbor" in found["keys"].seen
    assert outcomes(found)["block size"] == "fail"
    assert outcomes(diagnose(FRESH, metrics=metrics, block_size_tokens=32))["block size"] == "ok"
