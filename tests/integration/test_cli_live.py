"""The commands against each other, as processes over real sockets: an engine played from a capture, a service, questions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvatlas.ingest.recording import read_frames
from tests.models.ports import free_port

DATA = Path(__file__).parent.parent / "data" / "vllm-0.32"
NAME = "truth-base"
POD = "127.0.0.1:8101"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kvatlas", *map(str, arguments)]


def kvatlas(
    *arguments: str | Path, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, input=stdin, timeout=60, check=False, env=environment
    )


@contextmanager
def started(*arguments: str | Path, stop: int = signal.SIGINT) -> Iterator[subprocess.Popen[str]]:
    """Run a command for as long as the block lasts, then ask it to end; it must do so by itself."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
        process.send_signal(stop)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 0, told
        assert "Traceback" not in told
    finally:
        process.kill()
        process.communicate()


class Fleet:
    """A service, and an engine that has published a whole capture and still answers replay requests."""

    def __init__(self, http: int, events: int, replay: int) -> None:
        self.url = f"http://127.0.0.1:{http}"
        self.events = f"tcp://127.0.0.1:{events}"
        self.replay = f"tcp://127.0.0.1:{replay}"
        self.engine = f"{self.events},replay={self.replay}"

    def pods(self) -> list[dict[str, Any]]:
        done = kvatlas("pods", "--url", self.url, "--json", env={"KVATLAS_API_TOKEN": "secret"})
        return [] if done.returncode else json.loads(done.stdout)["pods"]

    def wait_for_seq(self, seq: int) -> None:
        for _ in range(60):
            if any((pod["next_seq"], pod["queue_depth"]) == (seq, 0) for pod in self.pods()):
                return
            time.sleep(0.1)
        raise AssertionError(f"frame {seq} did not come: {self.pods()}")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    http, grpc, events, replay = [free_port() for _ in range(4)]
    running = Fleet(http, events, replay)
    settings = tmp_path_factory.mktemp("serve") / "kvatlas.yaml"
    settings.write_text(f"api: {{token: secret, grpcPort: {grpc}}}\n")
    serve = ("serve", "--config", settings, "--port", str(http), "--engine", running.engine, "--set", "zmq.reconnectMax=200ms")
    play = ("replay", DATA / f"{NAME}.bin", "--to", running.events, "--replay-endpoint", running.replay)
    with started(*serve, stop=signal.SIGTERM), started(*play, "--speed", "0", "--linger", "forever"):
        running.wait_for_seq(488)
        yield running


def test_pods_shows_the_stream_for_people_and_programs(fleet: Fleet) -> None:
    shown = kvatlas("pods", "--url", fleet.url, "--token", "secret")
    assert shown.returncode == 0
    assert POD in shown.stdout
    assert "fresh" in shown.stdout
    (pod,) = fleet.pods()
    assert (pod["pod"], pod["model"], pod["state"], pod["gaps"]) == (POD, "tiny", "fresh", 0)


def test_pods_watches_until_it_is_interrupted(fleet: Fleet) -> None:
    with started("pods", "--url", fleet.url, "--token", "secret", "--watch", "--interval", "50ms", "--json") as watching:
        assert watching.stdout is not None
        for _ in range(3):
            assert POD in watching.stdout.readline()


def test_score_answers_as_the_engine_would(fleet: Fleet) -> None:
    record = (DATA / f"{NAME}.requests.jsonl").read_text().splitlines()[-1]
    tokens = json.loads(record)["prompt_token_ids"]
    asked = ("score", "--url", fleet.url, "--token", "secret")
    by_line = kvatlas(*asked, "--tokens-file", "-", "--json", stdin=record)
    assert by_line.returncode == 0, by_line.stderr
    (pod,) = json.loads(by_line.stdout)["pods"]
    assert pod["pod"] == POD
    assert pod["predicted_cached_tokens"] == (len(tokens) - 1) // 32 * 32
    listed = ",".join(map(str, tokens))
    for_people = kvatlas(*asked, "--tokens", listed, "--scorer", "coverage", "--pods", f"{POD},elsewhere")
    assert POD in for_people.stdout
    assert "Scorer: coverage" in " ".join(for_people.stdout.split())  # however wide the screen is
    salted = json.loads(kvatlas(*asked, "--model", "tiny", "--tokens", listed, "--salt", "pepper", "--json").stdout)
    assert salted["pods"][0]["predicted_cached_tokens"] == 0


def test_a_missing_token_is_told(fleet: Fleet) -> None:
    done = kvatlas("pods", "--url", fleet.url)
    assert done.returncode == 2
    assert "KVATLAS_API_TOKEN" in done.stderr


def test_record_takes_what_the_engine_kept_byte_for_byte(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "engine.bin"
    done = kvatlas("record", fleet.events, "--replay", fleet.replay, "-o", path, "--frames", "488", "--duration", "20s")
    assert done.returncode == 0, done.stderr
    recorded = [(frame.topic, frame.seq, frame.payload) for frame in read_frames(path)]
    assert recorded == [(frame.topic, frame.seq, frame.payload) for frame in read_frames(DATA / f"{NAME}.bin")]


def test_record_ends_on_an_interrupt_and_leaves_a_good_file(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "engine.bin"
    with started("record", fleet.events, "--replay", fleet.replay, "-o", path):
        for _ in range(100):
            if path.exists() and path.stat().st_size == (DATA / f"{NAME}.bin").stat().st_size:
                break
            time.sleep(0.1)
    assert len(list(read_frames(path))) == 488


def test_record_without_a_frame_ends_with_status_1(tmp_path: Path) -> None:
    done = kvatlas("record", "tcp://127.0.0.1:1", "-o", tmp_path / "engine.bin", "--duration", "300ms")
    assert done.returncode == 1
    assert "Nothing was recorded" in done.stderr


def test_doctor_finds_a_healthy_fleet(fleet: Fleet) -> None:
    done = kvatlas(
        "doctor", "--url", fleet.url, "--token", "secret", "--engine", fleet.engine, "--duration", "1500ms", "--json"
    )
    assert done.returncode == 0, done.stdout
    *checks, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["summary"]["fail"] == 0
    seen = {(check["subject"], check["name"]): (check["outcome"], check["seen"]) for check in checks}
    assert seen["installation", "core"][1].startswith(("native", "reference"))
    assert seen[fleet.url, "ready"][0] == "ok"
    assert seen[fleet.url, f"stream {POD}"][0] == "ok"
    assert seen[fleet.url, "block size"][0] == "ok"
    assert seen[fleet.events, "replay"] == ("ok", "answers with 488 frames, from the engine's first one on")
    assert seen[fleet.events, "engine hashes"] == ("ok", "sha256_cbor, PYTHONHASHSEED unset: all 1160 blocks checked")
    assert seen[fleet.events, "sequence numbers"][0] == "ok"


def test_doctor_says_why_a_broken_fleet_is_broken() -> None:
    broken = ("--url", "http://127.0.0.1:1", "--engine", "tcp://127.0.0.1:1", "--duration", "300ms", "--block-size", "64")
    done = kvatlas("doctor", *broken)
    assert done.returncode == 1
    assert "nothing answers at this address" in done.stdout
    assert "cannot be reached" in done.stdout


def test_doctor_takes_broken_settings_as_a_finding(tmp_path: Path) -> None:
    settings = tmp_path / "kvatlas.yaml"
    settings.write_text("index: {maxsize: 5}\n")
    done = kvatlas("doctor", "--config", settings, env={"KVATLAS_API_PORT": "1"})
    assert done.returncode == 1
    assert 'did you mean "index.maxSize"' in done.stdout
