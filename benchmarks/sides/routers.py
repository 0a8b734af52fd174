"""Routers as processes: kvatlas and other people's, each in front of the same engines, in its cache-aware mode."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.sides.install import BaselineError, environment
from benchmarks.sides.process import ROOT

START_S = 60.0
MODEL = "tiny"
TINY = ROOT / "tests" / "data" / "tinymodel"

Command = Callable[[int, Sequence[str]], list[str]]
"""From the port to listen on and the engines' URLs."""


def _kvatlas(port: int, engines: Sequence[str]) -> list[str]:
    named = [part for engine in engines for part in ("--endpoint", engine)]
    own = ["--set", f"tokens.models.{MODEL}={TINY}", "--set", "log.level=warning", "--set", "zmq.bind=false"]
    free = ["--api-port", "0", "--set", "api.grpcPort=0"]
    return [sys.executable, "-m", "kvatlas", "route", *named, "--port", str(port), *free, *own]


def _sglang(port: int, engines: Sequence[str]) -> list[str]:
    python = str(environment("sglang-router==0.3.2") / "python")
    return [
        python,
        "-m",
        "sglang_router.launch_router",
        "--worker-urls",
        *engines,
        "--policy",
        "cache_aware",
        "--port",
        str(port),
    ]


def _vllm(port: int, engines: Sequence[str]) -> list[str]:
    router = str(environment("vllm-router==0.1.17") / "vllm-router")
    return [router, "--worker-urls", *engines, "--policy", "cache_aware", "--host", "127.0.0.1", "--port", str(port)]


def _smg(port: int, engines: Sequence[str]) -> list[str]:
    smg = str(environment("smg==1.13.0") / "smg")
    return [smg, "launch", "--worker-urls", *engines, "--policy", "cache_aware", "--host", "127.0.0.1", "--port", str(port)]


ROUTERS: dict[str, Command] = {
    "kvatlas": _kvatlas,
    "sglang-router 0.3.2": _sglang,
    "vllm-router 0.1.17": _vllm,
    "smg 1.13.0": _smg,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def canned_engines(count: int, events: int = 8) -> Iterator[list[str]]:
    """Run engines that cost next to nothing; yield their URLs."""
    with ExitStack() as stack:
        urls = []
        for _ in range(count):
            command = [sys.executable, "-m", "benchmarks.sides.canned_engine", "0", str(events)]
            engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            stack.callback(_end, engine)
            assert engine.stdout is not None
            urls.append(f"http://127.0.0.1:{int(engine.stdout.readline())}")
        yield urls


@contextmanager
def router(name: str, engines: Sequence[str], log: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Run a router until the block ends; yield its URL. Raises BaselineError where it does not come up."""
    port = free_port()
    command = [*ROUTERS[name](port, engines), *options]
    with open(log, "w", encoding="utf-8") as written:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
    try:
        _wait_until_it_routes(name, process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _wait_until_it_routes(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if ask(port, "hello") == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise BaselineError(f"{name} does not route; the end of its log: {log.read_text(errors='replace')[-500:]}")


def ask(port: int, prompt: str) -> int:
    """Send one completion; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 8})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process that was started here, with its children where it leads a session of its own."""
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
