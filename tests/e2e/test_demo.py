"""What a newcomer runs: the demo and the examples, as processes of their own."""

from __future__ import annotations

import gzip
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvatlas.demo
from kvatlas.backtest import RecordedRequest
from kvatlas.demo.captures import ENGINES, FOLDER, load, pack
from kvatlas.demo.timeline import Check, sample, tallies
from kvatlas.keys import as_token_array

REPOSITORY = Path(__file__).parents[2]
CAPTURES = REPOSITORY / "tests" / "data" / "vllm-0.32"


def run(*arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KVATLAS_API_PORT": "1", "COLUMNS": "110"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )


def test_demo_predicts_what_the_engines_said_across_a_killed_service() -> None:
    done = run("-m", "kvatlas.demo", "--requests", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "As promised: 59 of 60 predictions are exactly what the engine then reported" in done.stdout
    assert "kill -9" in done.stdout
    assert re.search(r"curl -s http://127\.0\.0\.1:\d+/v1/pods", done.stdout)


def test_demo_leaves_no_service_behind_when_it_is_terminated() -> None:
    command = [sys.executable, "-m", "kvatlas.demo", "--stay", "--requests", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        url = ""
        for line in demo.stdout:
            url = (re.findall(r"curl -s (http://\S+)/v1/pods", line) or [url])[0]
            if "Ctrl-C ends it" in line:
                break
        demo.send_signal(signal.SIGTERM)
        demo.wait(20)
    port = int(url.rpartition(":")[2])
    assert not _listens(port)


def test_a_demo_that_cannot_start_its_service_says_why(tmp_path: Path) -> None:
    """The service is the ``kvatlas`` beside this Python; here it is one that fails."""
    (tmp_path / "kvatlas").write_text("#!/bin/sh\necho 'no such module' >&2\nexit 3\n")
    (tmp_path / "kvatlas").chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(tmp_path / 'python')!r}; from kvatlas.demo.__main__ import main; sys.exit(main())"
    )
    done = run("-c", code)
    assert done.returncode == 2
    assert "the service ended before it listened" in done.stderr
    assert "no such module" in done.stderr


def test_packaged_captures_are_those_of_the_tests(tmp_path: Path) -> None:
    """If not: python -m kvatlas.demo.captures tests/data/vllm-0.32"""
    pack(CAPTURES, tmp_path)
    packaged = Path(kvatlas.demo.__file__).parent / FOLDER
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in packaged.iterdir())
    for name in made:
        assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((packaged / name).read_bytes()), name
    assert sum(path.stat().st_size for path in packaged.iterdir()) < 1_500_000


def test_recordings_hold_frames_without_a_gap_and_requests_with_the_engines_own_figures(tmp_path: Path) -> None:
    for engine in ENGINES:
        recording = load(engine, tmp_path)
        assert [frame.seq for frame in recording.frames] == list(range(len(recording.frames)))
        assert len(recording.requests) == 300
        assert all(request.cached_tokens is not None for request in recording.requests)


def check(predicted: int, cached: int, *, after_reset: bool = False) -> Check:
    request = RecordedRequest(0.0, "r", as_token_array([1] * 64), "here", cached_tokens=cached, after_reset=after_reset)
    return Check(ENGINES[0], request, predicted, 0.001)


def test_a_prediction_holds_if_exact_or_first_after_a_reset() -> None:
    assert check(32, 32).holds
    assert check(32, 0, after_reset=True).holds
    assert not check(32, 0).holds
    (tally,) = tallies([check(32, 32), check(32, 0, after_reset=True), check(0, 32)])
    assert (tally.requests, tally.exact, tally.after_reset, tally.wrong) == (3, 1, 1, 1)


def test_the_sample_shows_everything_that_was_not_exact() -> None:
    wrong = check(0, 32)
    rows = sample([check(32, 32)] * 50 + [wrong] + [check(32, 32)] * 50, 5)
    assert len(rows) == 5
    assert wrong in rows


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ("scheduler_library.py", "a question about the manual  -> engine-b"),
        ("offline_publisher.py", "16 of 97 tokens cached  (fresh, 2 replays, 1 restarts)"),
    ],
)
def test_example_runs(example: str, says: str) -> None:
    done = run(str(REPOSITORY / "examples" / example))
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def _listens(port: int, timeout_s: float = 5.0) -> bool:
    """Tell whether something still listens after a while."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return False
        time.sleep(0.05)
    return True
