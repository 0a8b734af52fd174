"""What recorded events and requests come to when they are run through the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.backtest import Backtest, Captures, Prediction, Summary, read_requests
from kvatlas.errors import RecordingError, RequestError
from kvatlas.ingest.recording import RecordingWriter, read_frames
from kvatlas.types import Frame

DATA = Path(__file__).parents[2] / "data" / "vllm-0.32"
PROMPT = list(range(100, 164))
TOPIC = "kv@10.0.0.7:8000@llama"


def run(captures: Sequence[Path], requests: Path | None = None, **options: Any) -> tuple[list[Prediction], Summary]:
    backtest = Backtest(Captures(captures), **options)
    predictions = list(backtest.run(read_requests(requests) if requests else ()))
    return predictions, backtest.summary()


def stored(tokens: Sequence[int], first_hash: int = 1, **fields: Any) -> dict[str, Any]:
    hashes = list(range(first_hash, first_hash + len(tokens) // 16))
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": list(tokens)}
    return {**event, "block_size": 16, "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


def capture(path: Path, *frames: tuple[float, int, list[dict[str, Any]]], topic: str = TOPIC, rank: int | None = None) -> Path:
    """Write frames of (receive time, sequence number, events)."""
    with RecordingWriter(path) as writer:
        for received_s, seq, events in frames:
            payload = msgspec.msgpack.encode([received_s, events, rank])
            writer.append_frame(Frame(topic, seq, payload, int(received_s * 1e9)))
    return path


def requests(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def asked(sent_s: float, cached: int | None = None, **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens_details": {"cached_tokens": cached}} if cached is not None else {"prompt_tokens_details": None}
    return {"t": sent_s, "tag": f"at {sent_s}", "prompt_token_ids": PROMPT, "usage": usage, "kw": {}, **fields}


@pytest.mark.parametrize("path", sorted(DATA.glob("*.bin")), ids=lambda path: path.name)
def test_every_capture_of_a_real_vllm_is_understood_and_explained(path: Path) -> None:
    _, summary = run([path])
    assert summary.frames > 0
    assert (summary.decode_faults, summary.unknown_events, summary.unexplained_hashes) == (0, 0, 0)
    assert (summary.gaps, summary.duplicates, summary.restarts) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "differ", "resets"),
    [("truth-base", {"r33", "r252"}, 2), ("truth-hybrid64", set(), 3)],
    ids=["truth-base", "truth-hybrid64"],
)
def test_predictions_equal_the_engine_but_for_the_first_request_after_a_reset(name: str, differ: set[str], resets: int) -> None:
    predictions, summary = run([DATA / f"{name}.bin"], DATA / f"{name}.requests.jsonl")
    wrong = [prediction.request for prediction in predictions if not prediction.exact]
    assert {request.tag for request in wrong} == differ
    assert all(request.after_reset for request in wrong)
    assert (summary.requests, summary.compared, summary.exact) == (300, 300, 300 - len(differ))
    assert (summary.compared_but_after_reset, summary.exact_but_after_reset) == (300 - resets, 300 - resets)


def test_a_live_capture_and_the_replay_of_the_same_engine_count_once() -> None:
    paths = [DATA / "hybrid-gemma3.bin", DATA / "hybrid-gemma3.replay.bin"]
    _, both = run(paths)
    _, one = run(paths[:1])
    assert (both.frames, both.duplicates, both.gaps, both.restarts) == (38, 19, 0, 0)
    assert both.events == one.events


def test_events_received_later_do_not_count(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT)]))
    predictions, _ = run([path], requests(tmp_path / "r.jsonl", asked(10.0), asked(10.5)))
    assert [dict(prediction.predicted_cached_tokens) for prediction in predictions] == [
        {"10.0.0.7:8000": 0},
        {"10.0.0.7:8000": 48},
    ]


def test_every_pod_of_the_captures_is_listed_before_its_first_event(tmp_path: Path) -> None:
    first = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT)]))
    second = capture(tmp_path / "b.bin", (20.0, 0, [stored(PROMPT)]), topic="kv@10.0.0.8:8000@llama")
    predictions, summary = run([first, second], requests(tmp_path / "r.jsonl", asked(11.0), asked(21.0)))
    assert predictions[0].predicted_cached_tokens == {"10.0.0.7:8000": 48, "10.0.0.8:8000": 0}
    assert predictions[1].predicted_cached_tokens == {"10.0.0.7:8000": 48, "10.0.0.8:8000": 48}
    assert summary.streams == ("10.0.0.7:8000", "10.0.0.8:8000")


def test_ranks_of_a_pod_are_told_apart(tmp_path: Path) -> None:
    ranks = [capture(tmp_path / f"{rank}.bin", (10.0 + rank, 0, [stored(PROMPT)]), rank=rank) for rank in (0, 1)]
    (prediction, pinned), summary = run(
        ranks, requests(tmp_path / "r.jsonl", asked(10.5, cached=0), asked(10.6, cached=0, dp_rank=1))
    )
    assert prediction.predicted_cached_tokens == {"10.0.0.7:8000": 48}
    assert prediction.predicted_by_rank == {"10.0.0.7:8000": {0: 48, 1: 0}}
    assert (prediction.exact, pinned.exact) == (None, True)
    assert summary.compared == 1


def test_a_request_is_compared_with_the_pod_that_served_it(tmp_path: Path) -> None:
    first = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT)]))
    second = capture(tmp_path / "b.bin", (10.0, 0, [{"type": "AllBlocksCleared"}]), topic="kv@10.0.0.8:8000@llama")
    file = requests(
        tmp_path / "r.jsonl",
        asked(11.0, cached=48),
        asked(12.0, cached=48, pod="10.0.0.7:8000"),
        asked(13.0, cached=48, pod="10.0.0.8:8000"),
    )
    predictions, _ = run([first, second], file)
    assert [prediction.exact for prediction in predictions] == [None, True, False]


def test_a_model_that_no_topic_names_is_an_adapter(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT, lora_name="french")]))
    file = requests(tmp_path / "r.jsonl", asked(11.0, model="llama"), asked(12.0, model="french"), asked(13.0))
    predictions, _ = run([path], file)
    assert [sum(prediction.predicted_cached_tokens.values()) for prediction in predictions] == [0, 48, 0]


def test_a_salted_request_finds_salted_blocks_only(tmp_path: Path) -> None:
    extra_keys = [["s1"], None, None, None]
    path = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT, extra_keys=extra_keys)]))
    file = requests(tmp_path / "r.jsonl", asked(11.0), asked(12.0, kw={"cache_salt": "s1", "session_id": "x"}))
    predictions, _ = run([path], file)
    assert [sum(prediction.predicted_cached_tokens.values()) for prediction in predictions] == [0, 48]


def test_a_gap_makes_the_stream_stale_until_the_engine_is_cleared(tmp_path: Path) -> None:
    clear = [{"type": "AllBlocksCleared"}]
    path = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT)]), (20.0, 3, []), (30.0, 4, clear))
    predictions, summary = run([path], requests(tmp_path / "r.jsonl", asked(15.0), asked(25.0), asked(35.0)))
    stale = [{pod: reason.value for pod, reason in prediction.stale.items()} for prediction in predictions]
    assert stale == [{}, {"10.0.0.7:8000": "gap"}, {}]
    assert (summary.gaps, summary.frames_missed) == (1, 2)


def test_a_capture_that_begins_late_is_stale(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.bin", (10.0, 7, [stored(PROMPT)]))
    (prediction,), summary = run([path], requests(tmp_path / "r.jsonl", asked(15.0)))
    assert [reason.value for reason in prediction.stale.values()] == ["history_incomplete"]
    assert (summary.gaps, summary.frames_missed) == (0, 7)


def test_a_restarted_engine_holds_nothing(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.bin", (10.0, 0, [stored(PROMPT)]), (11.0, 1, []), (20.0, 0, [stored([7] * 16, 50)]))
    predictions, summary = run([path], requests(tmp_path / "r.jsonl", asked(15.0), asked(25.0)))
    assert [sum(prediction.predicted_cached_tokens.values()) for prediction in predictions] == [48, 0]
    assert (summary.restarts, summary.gaps) == (1, 0)


def test_events_that_cannot_be_read_are_counted_by_reason(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.bin", (10.0, 0, [{"type": "BlockStored", "block_hashes": 5}, {"type": "Novelty"}]))
    _, summary = run([path])
    assert summary.decode_faults_by_reason == {"bad_field": 1}
    assert summary.unknown_events == 1


def test_removals_of_unseen_blocks_and_blocks_without_tokens_are_unexplained(tmp_path: Path) -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [99], "medium": "GPU"}
    child = stored(PROMPT[:16], 5, parent_block_hash=4)
    _, summary = run([capture(tmp_path / "a.bin", (10.0, 0, [removed, child]))])
    assert (summary.removals_unknown, summary.orphans, summary.unexplained_hashes) == (1, 1, 2)


def test_requests_are_taken_in_order_of_time_and_notes_left_out(tmp_path: Path) -> None:
    file = requests(tmp_path / "r.jsonl", asked(3.0), {"t": 2.0, "tag": "reset_prefix_cache", "resp": [200]}, asked(1.0))
    read = read_requests(file)
    assert [(request.sent_s, request.after_reset) for request in read] == [(1.0, False), (3.0, True)]


@pytest.mark.parametrize(
    "line", [b"{", b'{"tag": "no time"}', b'{"t": 1, "prompt_token_ids": [-1]}', b'{"t": 1, "prompt_token_ids": "x"}']
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"t": 1.0, "tag": "reset"}\n' + line)
    with pytest.raises(RequestError, match=r"r\.jsonl line 2"):
        read_requests(file)


def test_a_request_without_a_model_needs_captures_of_one_model(tmp_path: Path) -> None:
    first = capture(tmp_path / "a.bin", (10.0, 0, []))
    second = capture(tmp_path / "b.bin", (10.0, 0, []), topic="kv@pod@mistral")
    with pytest.raises(RequestError, match="llama, mistral"):
        run([first, second], requests(tmp_path / "r.jsonl", asked(11.0)))


def test_a_capture_that_was_cut_short_is_refused_unless_allowed(tmp_path: Path) -> None:
    whole = (DATA / "truth-base.bin").read_bytes()
    path = tmp_path / "cut.bin"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordingError):
        Captures([path])
    kept = len(list(read_frames(path, tolerate_truncation=True)))
    assert Captures([path], tolerate_truncation=True).frames == kept > 0
