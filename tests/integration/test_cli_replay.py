"""``kvatlas replay`` and the command line's own manners, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.ingest.recording import RecordingWriter
from kvatlas.types import Frame

DATA = Path(__file__).parent.parent / "data" / "vllm-0.32"
KEYS = ["tag", "t", "prompt_tokens", "predicted_cached_tokens", "engine_cached_tokens"]


def kvatlas(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvatlas", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60, check=False)


def lines(done: subprocess.CompletedProcess[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The requests' objects and the summary."""
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    return objects[:-1], objects[-1]["summary"]


@pytest.mark.parametrize(
    ("name", "differ"), [("truth-base", ["r33", "r252"]), ("truth-hybrid64", [])], ids=["full attention", "sliding windows"]
)
def test_each_request_is_a_json_line_and_equals_the_engine(name: str, differ: list[str]) -> None:
    done = kvatlas("replay", DATA / f"{name}.bin", "--requests", DATA / f"{name}.requests.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    requests, summary = lines(done)
    assert len(requests) == 300
    assert all(list(request)[:5] == KEYS for request in requests)
    wrong = [
        request
        for request in requests
        if list(request["predicted_cached_tokens"].values()) != [request["engine_cached_tokens"]]
    ]
    assert [request["tag"] for request in wrong] == differ
    assert all(request["after_reset"] for request in wrong)
    assert summary["exact"] == 300 - len(differ)
    assert (summary["decode_faults"], summary["unexplained_hashes"]) == (0, 0)


def test_ranks_recorded_apart_are_one_pod() -> None:
    files = [DATA / "dp2-rank0.bin", DATA / "dp2-rank1.bin"]
    requests, summary = lines(kvatlas("replay", *files, "--requests", DATA / "dp2-rank0.requests.jsonl", "--json"))
    assert requests[0]["predicted_cached_tokens"] == {"127.0.0.1:8020": 0}
    assert requests[0]["engine_cached_tokens"] is None
    assert requests[-1]["predicted_by_rank"] == {"127.0.0.1:8020": {"0": 96, "1": 96}}
    assert summary["streams"] == ["127.0.0.1:8020", "127.0.0.1:8020#dp1"]


def test_a_block_size_of_the_engines_own_predicts_the_same() -> None:
    arguments = ("replay", DATA / "truth-base.bin", "--requests", DATA / "truth-base.requests.jsonl", "--json")
    assert lines(kvatlas(*arguments, "--block-size", "32"))[1]["exact"] == 298


def test_people_get_a_table_and_a_summary() -> None:
    done = kvatlas("replay", DATA / "hybrid-gemma3.bin", "--requests", DATA / "hybrid-gemma3.requests.jsonl")
    assert done.returncode == 0
    assert "H A again" in done.stdout
    assert "exact: 17 of 17 (100.0%)" in done.stdout
    assert "unexplained hashes: 0" in done.stdout


def test_events_that_cannot_be_read_end_with_status_1(tmp_path: Path) -> None:
    path = tmp_path / "damaged.bin"
    with RecordingWriter(path) as writer:
        writer.append_frame(Frame("kv@pod@model", 0, msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}], None]), 1))
        writer.append_frame(Frame("kv@pod@model", 1, b"\xc1", 2))
    done = kvatlas("replay", path, "--json")
    assert done.returncode == 1
    summary = lines(done)[1]
    assert summary["decode_faults"] == 2
    assert summary["decode_faults_by_reason"] == {"bad_field": 1, "not_msgpack": 1}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["replay", "nowhere.bin"], "nowhere.bin at byte 0: cannot be read"),
        (["replay", DATA / "hash_vectors.json"], "make captures with `kvatlas record`"),
        (["replay", DATA / "dp2-rank0.bin", "--requests", DATA / "dp2-rank0.bin"], "is no recorded request"),
        (["replay", DATA / "dp2-rank0.bin", "--decoder", "telepathy"], "generic, sglang, vllm"),
        (["replay", DATA / "dp2-rank0.bin", "--to", "here"], "tcp://127.0.0.1:5557"),
        (["record", "here", "-o", "/dev/null"], "is no address"),
        (["score", "--text", "hello", "--tokens", "1", "--model", "m"], "give one of --tokens"),
        (["score", "--tokens", "1,two", "--model", "m"], "'two' at position 1 is no integer"),
        (["score", "--tokens", "1", "--model", "m", "--url", "http://127.0.0.1:1"], "start `kvatlas serve`"),
        (["pods", "--url", "http://127.0.0.1:1"], "start `kvatlas serve`"),
        (["serve", "--set", "index.maxsize=5"], 'did you mean "index.maxSize"'),
        (["serve", "--engine", "10.0.0.7:5557"], "zmq.engines[0].endpoint"),
        (["doctor", "--engine", "tcp://a:1,colour=red"], "replay, pod, model, dp, decoder"),
    ],
    ids=lambda value: " ".join(map(str, value[:3])) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_told_in_a_line_with_a_remedy(arguments: list[str | Path], told: str) -> None:
    done = kvatlas(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_every_command_explains_itself_with_examples() -> None:
    overview = kvatlas("--help")
    for command in ("serve", "score", "pods", "record", "replay", "doctor"):
        assert command in overview.stdout
        shown = kvatlas(command, "--help")
        assert shown.returncode == 0
        assert f"kvatlas {command}" in shown.stdout.partition("Examples")[2]


def test_every_setting_is_listed_with_its_variable() -> None:
    done = kvatlas("serve", "--help-config")
    assert done.returncode == 0
    for text in ("zmq.endpoint", "api.port", "index.ttl", "index.maxSize", "KVATLAS_INDEX_MAX_SIZE", "tieredCache.weights"):
        assert text in done.stdout
