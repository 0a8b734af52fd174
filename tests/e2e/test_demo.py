"""What a newcomer runs: the demo and the examples, as processes of their own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO = (sys.executable, "-m", "kvatlas", "demo", "--engines", "2", "--users", "4")


def run(*arguments: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KVATLAS_API_PORT": "1", "COLUMNS": "110"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )


@contextmanager
def demo(*options: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "KVATLAS_API_PORT": "1", "COLUMNS": "110"}
    with subprocess.Popen([*DEMO, *options], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], says: str) -> str:
    """Return what a process writes up to and with a line that says something."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if says in line:
            return "".join(lines)
    raise AssertionError(f"it ended before it said {says!r}:\n" + "".join(lines))


def ports(text: str) -> set[int]:
    return {int(port) for port in re.findall(r"(?:http|tcp)://127\.0\.0\.1:(\d+)", text)}


def answered_to(said: str) -> dict[str, Any]:
    """Send what the printed curl line sends, with the headers that curl would send, and return the answer."""
    line = re.search("try it +(curl -s .*)", said)
    assert line is not None, said
    _, _, url, *options = shlex.split(line[1])
    given = dict(zip(options[::2], options[1::2], strict=True))
    name, value = given.get("-H", "content-type: application/x-www-form-urlencoded").split(": ")
    answer: dict[str, Any] = httpx.post(url, content=given["-d"], headers={name: value}, timeout=60).raise_for_status().json()
    return answer


@pytest.mark.timeout(400)
def test_the_demo_loses_no_request_while_an_engine_is_killed_and_another_joins_and_ends_all_it_started() -> None:
    with demo("--stay", "--requests", "40") as process:
        said = read_until(process, "engine-3 joins")
        assert answered_to(said)["choices"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        said += process.stdout.read()
        assert process.wait(120) == 0, said
    assert "kill -9 engine-" in said
    assert " answered, 0 failed." in said
    assert "As promised" in said
    assert len(ports(said)) >= 6
    assert all(not listens(port) for port in ports(said))


@pytest.mark.timeout(400)
def test_nothing_is_left_of_a_demo_that_is_killed() -> None:
    with demo("--requests", "1000") as process:
        said = read_until(process, "and then")
        process.kill()
        process.wait(120)
    assert len(ports(said)) >= 6
    assert all(not listens(port) for port in ports(said))


@pytest.mark.timeout(200)
def test_a_demo_whose_engines_cannot_start_says_why(tmp_path: Path) -> None:
    """Its processes are ``python -m kvatlas``, with a Python that fails here."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 3\n")
    broken.chmod(0o755)
    code = f"import sys; sys.executable = {str(broken)!r}; sys.argv = ['kvatlas', 'demo']; from kvatlas.cli import main; main()"
    done = run("-c", code)
    assert done.returncode == 2
    assert "it ended before it listened" in done.stderr
    assert "no such module" in done.stderr


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


def listens(port: int, timeout_s: float = 30.0) -> bool:
    """Tell whether something still listens after a while."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return False
        time.sleep(0.05)
    return True
