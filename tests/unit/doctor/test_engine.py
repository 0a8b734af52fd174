"""What the doctor says of an engine, from what was heard of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.config import EngineSettings
from kvatlas.doctor import Check, EngineExpectations, EngineSample, ExpectedKeys, check_engine, sample_engines
from kvatlas.ingest.decode import load_decoder
from kvatlas.ingest.publisher import EventPublisher
from kvatlas.ingest.recording import read_frames
from kvatlas.ingest.tap import Heard, TappedEngine
from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.types import Frame

DATA = Path(__file__).parents[2] / "data" / "vllm-0.32"
ENGINE = TappedEngine("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5607")


def sample(
    *frames: Frame, live: bool = False, decoder: str = "vllm", engine: TappedEngine = ENGINE, **heard: Any
) -> EngineSample:
    """What a tap that heard these frames would leave."""
    counts = {"live_frames": len(frames)} if live else {"kept_frames": len(frames)}
    taken = EngineSample(
        Heard(engine, **{"connected": True, "replay_answered": True, **counts, **heard}), load_decoder(decoder)
    )
    for frame in frames:
        taken.take(frame, live)
    return taken


def recorded(name: str) -> EngineSample:
    return sample(*read_frames(DATA / f"{name}.bin"))


def diagnose(taken: EngineSample, **expected: Any) -> dict[str, Check]:
    return {check.name: check for check in check_engine(taken, EngineExpectations(**expected))}


def outcomes(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.outcome.value for name, check in checks.items()}


def frame(
    seq: int = 0, *events: dict[str, Any], topic: str = "kv@10.0.0.7:8000@llama", rank: int | None = 0, age_s: float = 0.0
) -> Frame:
    received_s = 1_800_000_000.0
    return Frame(topic, seq, msgspec.msgpack.encode([received_s - age_s, list(events), rank]), int(received_s * 1e9))


def stored(block_hash: int | bytes, tokens: list[int], **fields: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": [block_hash], "parent_block_hash": None, "token_ids": tokens}
    return {**event, "block_size": len(tokens), "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


ALGORITHMS = {
    "base-sha256_cbor": "sha256_cbor, PYTHONHASHSEED unset: all 173 blocks",
    "base-sha256_cbor-raw-bytes-hashes": "sha256_cbor, PYTHONHASHSEED unset: all 111 blocks",
    "base-xxhash_cbor-seed42": "xxhash_cbor, PYTHONHASHSEED=42: all 111 blocks",
    "truth-base": "sha256_cbor, PYTHONHASHSEED unset: all 1160 blocks",
    "hybrid-gemma3-retention64": "sha256_cbor, PYTHONHASHSEED unset: all 492 blocks",
    "offload-tiering-fs": "sha256_cbor, PYTHONHASHSEED unset: all 206 blocks",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_real_engines_algorithm_and_seed_are_recognized_from_every_block(name: str) -> None:
    check = diagnose(recorded(name))["engine hashes"]
    assert check.outcome.value == "ok"
    assert ALGORITHMS[name] in check.seen


def test_a_healthy_engine_passes_every_check() -> None:
    checks = outcomes(diagnose(recorded("truth-base")))
    assert set(checks.values()) == {"ok", "skip"}
    assert [name for name, outcome in checks.items() if outcome == "skip"] == ["offload events"]


@pytest.mark.parametrize(
    ("name", "outcome", "seen"),
    [
        ("offload-cpu-placeholder-events", "warn", "placeholders"),
        ("offload-cpu-self-describing", "ok", "with tokens"),
        ("offload-tiering-fs", "ok", "storage"),
        ("truth-base", "skip", "none seen"),
    ],
)
def test_offload_events_tell_their_tokens_or_are_placeholders(name: str, outcome: str, seen: str) -> None:
    check = diagnose(recorded(name))["offload events"]
    assert check.outcome.value == outcome
    assert seen in check.seen
    if outcome == "warn":
        assert check.remedy is not None
        assert "self_describing_kv_events" in check.remedy


@pytest.mark.parametrize(
    ("index", "outcome", "seen"),
    [
        (32, "ok", "exact"),
        (16, "ok", "exact"),
        (64, "warn", "steps of 64"),
        (24, "warn", "steps of 96"),
        (48, "warn", "steps of 96"),
    ],
)
def test_block_sizes_are_exact_or_a_lower_bound(index: int, outcome: str, seen: str) -> None:
    check = diagnose(recorded("base-sha256_cbor"), block_size_tokens=index)["block size"]
    assert check.outcome.value == outcome
    assert seen in check.seen
    if outcome == "warn":
        assert "32" in (check.remedy or "")


def test_nothing_at_the_address_fails_and_says_how_to_start_an_engine() -> None:
    checks = diagnose(sample(connected=False, replay_answered=None))
    assert outcomes(checks)["events arriving"] == "fail"
    assert "--kv-events-config" in (checks["events arriving"].remedy or "")
    assert outcomes(checks)["engine hashes"] == "skip"


def test_a_silent_engine_is_a_warning() -> None:
    assert outcomes(diagnose(sample()))["events arriving"] == "warn"


def test_live_frames_tell_the_lag_and_a_wrong_clock() -> None:
    on_time = diagnose(sample(frame(age_s=0.004), live=True))["events arriving"]
    assert on_time.outcome.value == "ok"
    assert "4.0 ms" in on_time.seen
    assert diagnose(sample(frame(age_s=60), live=True))["events arriving"].outcome.value == "warn"
    assert diagnose(sample(frame(age_s=-60), live=True))["events arriving"].outcome.value == "warn"


def test_an_address_that_sends_something_else_fails() -> None:
    assert outcomes(diagnose(sample(malformed=3)))["events arriving"] == "fail"


def test_replay_endpoint_unnamed_silent_incomplete_or_complete() -> None:
    unnamed = sample(frame(), engine=TappedEngine("tcp://10.0.0.7:5557"))
    assert outcomes(diagnose(unnamed))["replay"] == "warn"
    assert outcomes(diagnose(sample(frame(), replay_answered=False)))["replay"] == "fail"
    assert outcomes(diagnose(sample(frame(5))))["replay"] == "warn"
    assert outcomes(diagnose(sample(frame(0))))["replay"] == "ok"


def test_a_replay_endpoint_that_gave_no_answer_fails_even_where_listening_ended_first() -> None:
    taken = sample(frame(), live=True, replay_answered=None)
    taken.replay_reached = False
    assert outcomes(diagnose(taken))["replay"] == "fail"
    taken.replay_reached = True
    check = diagnose(taken)["replay"]
    assert (check.outcome.value, check.remedy) == ("warn", "listen longer with --duration")


async def listened(replay_endpoint: str, engine_endpoint: str = "tcp://127.0.0.1:1") -> Check:
    settings = EngineSettings(endpoint=engine_endpoint, replay_endpoint=replay_endpoint)
    (taken,) = await sample_engines([settings], [load_decoder("vllm")], 0.2)
    return diagnose(taken)["replay"]


async def test_the_replay_endpoint_is_asked_at_once_beside_listening() -> None:
    async with EventPublisher(replay_endpoint="tcp://127.0.0.1:0", topic="kv@pod@model") as engine:
        for _ in range(3):
            await engine.publish(b"x")
        assert engine.replay_endpoint is not None
        assert (await listened(engine.replay_endpoint)).outcome.value == "warn"
        wrong = await listened("tcp://127.0.0.1:1", engine.endpoint)
        assert (wrong.outcome.value, wrong.seen) == ("fail", "tcp://127.0.0.1:1 does not answer")


def test_missing_repeated_and_restarted_sequences_are_told() -> None:
    gap = diagnose(sample(frame(3), frame(6)))["sequence numbers"]
    assert (gap.outcome.value, gap.seen[:16]) == ("warn", "1 gaps (2 frames")
    repeated = diagnose(sample(frame(3), frame(4), frame(3)))["sequence numbers"]
    assert repeated.outcome.value == "ok"
    restarted = diagnose(sample(frame(3), frame(4), frame(0, {"type": "AllBlocksCleared"}, age_s=-1)))["sequence numbers"]
    assert "1 restarts" in restarted.seen


def test_a_topic_that_the_service_would_not_receive_fails() -> None:
    assert outcomes(diagnose(sample(frame(topic="kv-events"))))["topic"] == "fail"
    assert outcomes(diagnose(sample(frame(topic="kv-events")), topic_filter=""))["topic"] == "warn"


def test_a_topic_without_names_is_fine_where_the_settings_name_them() -> None:
    taken = sample(frame(topic="kv@"))
    taken.settings = EngineSettings(endpoint="tcp://10.0.0.7:5557", pod="a", model="llama")
    assert outcomes(diagnose(taken))["topic"] == "ok"


def test_events_that_cannot_be_read_fail_and_unknown_ones_warn() -> None:
    lost = diagnose(sample(frame(0, {"type": "BlockStored", "block_hashes": 1})))["events understood"]
    assert (lost.outcome.value, "bad_field 1" in lost.seen) == ("fail", True)
    assert outcomes(diagnose(sample(frame(0, {"type": "Novelty"}))))["events understood"] == "warn"


def test_the_rank_is_told_where_events_have_it() -> None:
    assert "1" in diagnose(recorded("dp2-rank1"))["data-parallel rank"].seen
    assert "not in the events" in diagnose(sample(frame(rank=None)))["data-parallel rank"].seen


def test_a_secret_seed_is_recognized_when_it_is_given() -> None:
    scheme = HashScheme("xxhash_cbor", "secret")
    tokens = [1, 2, 3, 4]
    digest = scheme.block_hash(scheme.none_hash(), tokens)
    taken = sample(frame(0, stored(int.from_bytes(digest[-8:], "big"), tokens)))
    assert outcomes(diagnose(taken))["engine hashes"] == "warn"
    found = diagnose(taken, seeds=["secret"])["engine hashes"]
    assert found.seen.startswith("xxhash_cbor, PYTHONHASHSEED=secret")


def test_hashes_of_adapters_and_chains_without_a_beginning_are_not_judged() -> None:
    adapter = sample(frame(0, stored(1, [1, 2, 3, 4], lora_name="french")))
    assert outcomes(diagnose(adapter))["engine hashes"] == "skip"
    headless = sample(frame(0, stored(1, [1, 2, 3, 4], parent_block_hash=7)))
    assert outcomes(diagnose(headless))["engine hashes"] == "skip"


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93", msgspec.msgpack.encode([1.0, [["BlockStored", "x", 1]], 0])])
def test_garbage_is_reported_rather_than_raised(payload: bytes) -> None:
    checks = diagnose(sample(Frame("kv@a@b", 0, payload, 0)))
    assert outcomes(checks)["events understood"] == "fail"


# -- keys.mode: engine ----------------------------------------------------------------------------------------------------


def with_hashes(name: str, algorithm: str, seed: str, index: int = 32, **more: Any) -> dict[str, Check]:
    keys = ExpectedKeys("engine", HashScheme(algorithm, seed))
    return diagnose(recorded(name), keys=keys, block_size_tokens=index, **more)


def test_engine_hashes_as_the_settings_say_them_pass() -> None:
    checks = with_hashes("base-xxhash_cbor-seed42", "xxhash_cbor", "42")
    assert (checks["engine hashes"].outcome.value, checks["block size"].outcome.value) == ("ok", "ok")
    assert checks["engine hashes"].remedy is None


@pytest.mark.parametrize(
    ("algorithm", "seed"), [("sha256_cbor", UNSET_SEED), ("xxhash_cbor", "0"), ("sha256", "42"), ("sha256_cbor_64bit", "42")]
)
def test_another_algorithm_or_seed_than_the_engines_fails_with_the_settings_to_write(algorithm: str, seed: str) -> None:
    check = with_hashes("base-xxhash_cbor-seed42", algorithm, seed)["engine hashes"]
    assert check.outcome.value == "fail"
    assert (
        check.seen == f"xxhash_cbor, PYTHONHASHSEED=42, but the settings say {HashScheme(algorithm, seed)}: no prompt is found"
    )
    wanted = 'set keys.mode: engine, keys.engine.algorithm: xxhash_cbor, keys.engine.seed: "42", keys.blockSize: 32'
    assert check.remedy == wanted


def test_an_unset_seed_is_told_as_no_setting() -> None:
    check = with_hashes("truth-base", "xxhash_cbor", "42")["engine hashes"]
    assert check.remedy == (
        "set keys.mode: engine, keys.engine.algorithm: sha256_cbor, no keys.engine.seed, keys.blockSize: 32"
    )


@pytest.mark.parametrize("index", [16, 64])
def test_another_block_size_than_the_engines_fails(index: int) -> None:
    check = with_hashes("truth-base", "sha256_cbor", UNSET_SEED, index)["block size"]
    assert (check.outcome.value, check.remedy) == ("fail", "set keys.blockSize: 32")


def test_blocks_of_several_sizes_fail() -> None:
    taken = sample(frame(0, stored(1, [1, 2, 3, 4]), stored(2, [1, 2], group_idx=1)))
    checks = diagnose(taken, keys=ExpectedKeys("engine", HashScheme("sha256", UNSET_SEED)), block_size_tokens=4)
    assert (checks["block size"].outcome.value, checks["block size"].remedy) == ("fail", "set keys.mode: kvatlas")


def test_hashes_of_an_unknown_seed_fail_where_they_are_keys() -> None:
    scheme = HashScheme("sha256_cbor_64bit", "secret")
    digest = scheme.block_hash(scheme.none_hash(), [1, 2, 3, 4])
    taken = sample(frame(0, stored(int.from_bytes(digest, "big"), [1, 2, 3, 4])))
    unknown = diagnose(taken, keys=ExpectedKeys("engine", HashScheme("sha256", UNSET_SEED)))["engine hashes"]
    assert unknown.outcome.value == "fail"
    assert unknown.remedy is not None
    assert "--seed" in unknown.remedy
    given = diagnose(taken, keys=ExpectedKeys("engine", HashScheme("sha256", UNSET_SEED)), seeds=["secret"])["engine hashes"]
    assert given.remedy is not None
    assert 'keys.engine.algorithm: sha256_cbor_64bit, keys.engine.seed: "secret"' in given.remedy
    assert diagnose(taken, keys=ExpectedKeys("engine", scheme))["engine hashes"].outcome.value == "ok", "its own seed is tried"


def test_with_other_keys_it_is_told_that_they_could_be_engine_hashes() -> None:
    check = diagnose(recorded("base-xxhash_cbor-seed42"))["engine hashes"]
    assert check.outcome.value == "ok"
    assert check.remedy is not None
    assert 'keys.mode: engine, keys.engine.algorithm: xxhash_cbor, keys.engine.seed: "42", keys.blockSize: 32' in check.remedy


def test_placeholders_are_enough_where_keys_are_engine_hashes() -> None:
    assert with_hashes("offload-cpu-placeholder-events", "sha256_cbor", UNSET_SEED)["offload events"].outcome.value == "ok"
