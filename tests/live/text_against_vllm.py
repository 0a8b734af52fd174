"""Requests as text, through a whole service, against a real vLLM's own ``cached_tokens`` and ``prompt_tokens``.

    tests/live/vllm.sh setup                  # once: several GB
    python -m tests.live.text_against_vllm    # about three minutes on two cores

One engine with room for 60 blocks of 32 tokens runs with a chat template of its own (``--chat-template``) and is asked
sequentially: multi-turn chats over shared system prompts, with tools and without, completions, some with cache salts, some cut
by ``truncate_prompt_tokens``, some that it refuses. Two services follow it, each with the tiny model's tokenizer and the same
template: one with ``keys.mode`` kvatlas (blocks of 16 tokens), one with ``keys.mode`` engine.

Before each request both are asked ``POST /v1/score`` with that very request as ``chat`` or ``completion``. What they say of its
prompt's tokens and of the cached ones must be what the engine reports afterwards; what the engine refuses they must refuse.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from kvatlas.config import (
    ApiSettings,
    Config,
    EngineHashSettings,
    EngineSettings,
    IngestSettings,
    KeySettings,
    Seconds,
    TokenSettings,
    ZmqSettings,
)
from kvatlas.indexer import Indexer
from kvatlas.serve.service import serve
from tests.live.against_vllm import HERE, Engine, watch

MODEL = HERE.parent / "data" / "tinymodel"
TEMPLATES = HERE.parent / "data" / "chats" / "templates"
ENGINE_BLOCK = 32
MAX_MODEL_LEN = 1024
STARTUP_S = 300
SETTLE_S = 20
_CHAT_CHARS_MAX = 2400

KEYS = {
    "kvatlas": KeySettings(),
    "engine": KeySettings(
        mode="engine", block_size=ENGINE_BLOCK, engine=EngineHashSettings(algorithm="sha256_cbor", seed=None)
    ),
}
"""What the services' keys are, by ``keys.mode``."""

_TEXT = (
    "the flight was moved to gate seven because of fog over Oslo please tell every passenger that luggage follows tomorrow "
    "naïve café Straße Ελλάδα Привет مرحبا 日本語 한국어 🙂 👩\u200d👩\u200d👧 12345 3.14 x=y; {json} <b>tag</b> https://example.org/a?b=c"
)
_WORDS = _TEXT.split()


class TextEngine(Engine):
    """vLLM with a chat template from a file, and tools."""

    def __init__(self, log: Path, template: Path) -> None:
        super().__init__(log)
        self._template = template

    def start(self) -> float:
        """Start it; return how long it took, in seconds."""
        started = time.monotonic()
        command = [str(HERE / "vllm.sh"), "serve", str(self.http_port), str(self.event_port)]
        command += ["--chat-template", str(self._template), "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True, env=environment | {"HASH_ALGO": "sha256_cbor"}
        )
        while self._process.poll() is None and time.monotonic() - started < STARTUP_S:
            try:
                if self._client.get(f"{self.url}/health").status_code == 200:
                    return time.monotonic() - started
            except httpx.TransportError:
                time.sleep(0.5)
        sys.exit(f"vLLM did not come up: see {self._log.name}")


class Request(NamedTuple):
    """A request as both get it. ``chat``: the number of the chat that it goes on with."""

    kind: str
    body: dict[str, Any]
    chat: int | None

    @property
    def form(self) -> str:
        return "completion" if self.chat is None else "chat"


class Seen(NamedTuple):
    """What was said of a prompt; ``status`` 200 or that of a refusal."""

    status: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    source: str = ""


class Workload:
    """Chats and completions; seeded."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._systems = [self._text(words) for words in (30, 60, 90)]
        self._tools = [[self._tool(number) for number in range(count)] for count in (1, 3)]
        self._prefixes = [self._text(words) for words in (80, 140)]
        self._chats: list[dict[str, Any]] = []

    def next(self) -> Request:
        draw = self._random.random()
        if draw < 0.30:
            return self._completion()
        if draw < 0.33:
            return Request("chat, too long", {"messages": [_said("user", self._text(900))], **self._sampling()}, -1)
        return self._chat()

    def answered(self, request: Request, text: str) -> None:
        if request.chat is not None and request.chat >= 0:
            self._chats[request.chat]["messages"].append(_said("assistant", text))

    def _chat(self) -> Request:
        if self._chats and self._random.random() < 0.7:
            number = self._random.randrange(max(0, len(self._chats) - 5), len(self._chats))
        else:
            number = len(self._chats)
            self._chats.append(self._opened())
        chat = self._chats[number]
        if len(chat["messages"]) > 1 and "tools" in chat and self._random.random() < 0.4:
            chat["messages"] += self._looked_up(chat["tools"][0]["function"]["name"], len(chat["messages"]))
        chat["messages"].append(self._question())
        if len(json.dumps(chat, ensure_ascii=False)) > _CHAT_CHARS_MAX:
            chat["messages"] = chat["messages"][:1] + chat["messages"][-1:]
        kind = "chat, tools" if "tools" in chat else "chat"
        body = {**chat, "messages": list(chat["messages"]), **self._sampling()}
        if self._random.random() < 0.12:
            kind = "chat, truncated"
            body |= self._truncation()
        elif "cache_salt" in body:
            kind = "chat, salted"
        return Request(kind, body, number)

    def _opened(self) -> dict[str, Any]:
        chat: dict[str, Any] = {"messages": [_said("system", self._random.choice(self._systems))]}
        if self._random.random() < 0.3:
            chat["tools"] = self._random.choice(self._tools)
        if self._random.random() < 0.25:
            chat["cache_salt"] = self._random.choice(("tenant-0", "tenant-ü"))
        return chat

    def _completion(self) -> Request:
        draw = self._random.random()
        body = {"prompt": self._random.choice(self._prefixes) + self._text(self._random.choice((1, 10, 60)))}
        body |= self._sampling()
        if draw < 0.2:
            return Request("completion, truncated", body | self._truncation(), None)
        if draw < 0.4:
            return Request("completion, salted", body | {"cache_salt": self._random.choice(("tenant-0", "tenant-1"))}, None)
        return Request("completion", body, None)

    def _question(self) -> dict[str, Any]:
        text = self._text(self._random.choice((3, 12, 30)))
        if self._random.random() < 0.2:
            return {"role": "user", "content": [{"type": "text", "text": part} for part in (text, self._text(4))]}
        return _said("user", text)

    def _looked_up(self, name: str, number: int) -> list[dict[str, Any]]:
        """Return a call of a tool, and what it answered."""
        function = {"name": name, "arguments": json.dumps({"city": self._random.choice(_WORDS), "day": number})}
        call = {"id": f"call-{number}", "type": "function", "function": function}
        answer = {"role": "tool", "tool_call_id": f"call-{number}", "content": self._text(8)}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}, answer]

    def _truncation(self) -> dict[str, Any]:
        side = self._random.choice(({}, {"truncation_side": "left"}, {"truncation_side": "right"}))
        return {"truncate_prompt_tokens": self._random.choice((-1, 40, 128, 200, 5000)), **side}

    def _sampling(self) -> dict[str, Any]:
        return {"max_tokens": self._random.choice((1, 4, 8, 24)), "temperature": 0}

    def _text(self, words: int) -> str:
        return " ".join(self._random.choice(_WORDS) for _ in range(words)) + self._random.choice((".", "\n", " ", "?\n\n"))

    def _tool(self, number: int) -> dict[str, Any]:
        schema = {"type": "object", "properties": {"city": {"type": "string", "description": self._text(4)}}}
        function = {"name": f"look_up_{number}", "description": self._text(8), "parameters": schema}
        return {"type": "function", "function": function}


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def ask_engine(client: httpx.Client, request: Request) -> tuple[Seen, str]:
    """Send a request; return what the engine says of its prompt, and its answer."""
    route = "/v1/completions" if request.form == "completion" else "/v1/chat/completions"
    answer = client.post(route, json={"model": "tiny", **request.body})
    if answer.status_code != 200:
        return Seen(answer.status_code), ""
    body = answer.json()
    usage, choice = body["usage"], body["choices"][0]
    text = choice["text"] if request.form == "completion" else choice["message"].get("content")
    details = usage.get("prompt_tokens_details") or {}
    return Seen(200, usage["prompt_tokens"], details.get("cached_tokens") or 0), text or ""


def ask_service(client: httpx.Client, request: Request) -> Seen:
    """Return what a service says of a request's prompt."""
    answer = client.post("/v1/score", json={"model": "tiny", request.form: request.body})
    if answer.status_code != 200:
        return Seen(answer.status_code)
    body = answer.json()
    cached = body["pods"][0]["predicted_cached_tokens"] if body["pods"] else 0
    return Seen(200, body["prompt_tokens"], cached, body["tokens"]["source"])


def settle(client: httpx.Client, reference: Indexer) -> None:
    """Wait until a service has read all that the engine has published, which the reference asks the engine for."""
    deadline = time.monotonic() + SETTLE_S
    reference.sync()
    wanted = [pod.next_seq for pod in reference.pods() if pod.next_seq is not None]
    while time.monotonic() < deadline:
        pods = client.get("/v1/pods").json()["pods"]
        if [pod["next_seq"] for pod in pods if pod["next_seq"] is not None] == wanted and not any(
            pod["queue_depth"] for pod in pods
        ):
            return
        time.sleep(0.005)
    sys.exit(f"a service did not read up to {wanted} within {SETTLE_S} s: {pods}")


@contextmanager
def services(events: str, replay: str, template: Path) -> Iterator[dict[str, httpx.Client]]:
    """Run one service for each of KEYS, in a thread; give clients of them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    with ExitStack() as cleanup:
        clients = {}
        for mode, keys in KEYS.items():
            stop, address, ended = _start(loop, _config(events, replay, template, keys))
            cleanup.callback(ended)
            cleanup.callback(loop.call_soon_threadsafe, stop.set)
            clients[mode] = cleanup.enter_context(httpx.Client(base_url=address, timeout=60))
        yield clients
    loop.call_soon_threadsafe(loop.stop)


def _start(loop: asyncio.AbstractEventLoop, config: Config) -> tuple[asyncio.Event, str, Any]:
    started = threading.Event()
    found: list[str] = []
    stop = asyncio.Event()
    running = asyncio.run_coroutine_threadsafe(
        serve(config, stop=stop, started=lambda addresses: (found.append(addresses.http), started.set())[1]), loop
    )
    running.add_done_callback(lambda _: started.set())
    started.wait(60)
    if not found:
        running.result()
    return stop, found[0], lambda: running.result(30)


def _config(events: str, replay: str, template: Path, keys: KeySettings) -> Config:
    return Config(
        api=ApiSettings(port=0, grpc_port=0),
        keys=keys,
        zmq=ZmqSettings(
            bind=False, engines=(EngineSettings(endpoint=events, replay_endpoint=replay),), reconnect_max=Seconds(0.5)
        ),
        ingest=IngestSettings(gone_after=Seconds(600)),
        tokens=TokenSettings(
            models={"tiny": str(MODEL)}, max_model_len={"tiny": MAX_MODEL_LEN}, chat_templates={"tiny": str(template)}
        ),
    )


class Tally(msgspec.Struct):
    """What became of one service's answers for one kind of request."""

    requests: int = 0
    same: int = 0
    both_refuse: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    from_store: int = 0

    def add(self, ours: Seen, theirs: Seen) -> bool:
        """Count an answer; return whether both say the same."""
        self.requests += 1
        self.prompt_tokens += theirs.prompt_tokens
        self.cached_tokens += theirs.cached_tokens
        self.from_store += ours.source == "store"
        if theirs.status != 200:
            self.both_refuse += ours.status == 422
            return ours.status == 422
        same = ours.status == 200 and ours[1:3] == theirs[1:3]
        self.same += same
        return same


def run(requests: int, seed: int, template: Path, log: Path) -> tuple[dict[str, dict[str, Tally]], list[str], dict[str, int]]:
    """Return tallies by service and kind of request, what differed, and how many events of each kind there were."""
    engine = TextEngine(log, template)
    print(f"starting vLLM (log: {log}) ...", flush=True)
    print(f"it took {engine.start():.0f} s", flush=True)
    events, replay = (f"tcp://127.0.0.1:{engine.event_port + offset}" for offset in (0, 50))
    tallies: dict[str, dict[str, Tally]] = {mode: defaultdict(Tally) for mode in KEYS}
    differences: list[str] = []
    workload = Workload(seed)
    try:
        with (
            watch(events, replay) as reference,
            services(events, replay, template) as clients,
            httpx.Client(base_url=engine.url, timeout=120) as client,
        ):
            time.sleep(1)
            for number in range(requests):
                request = workload.next()
                predicted = {}
                for mode, service in clients.items():
                    settle(service, reference)
                    predicted[mode] = ask_service(service, request)
                theirs, text = ask_engine(client, request)
                workload.answered(request, text)
                for mode, ours in predicted.items():
                    if not tallies[mode][request.kind].add(ours, theirs):
                        differences.append(f"request {number} ({request.kind}), keys.mode {mode}: {ours}, vLLM {theirs}")
                if number % 25 == 24:
                    print(f"{number + 1} requests, {len(differences)} differences", flush=True)
            return tallies, differences, _events(clients["kvatlas"])
    finally:
        engine.kill()


def _events(service: httpx.Client) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in service.get("/metrics").text.splitlines():
        if line.startswith("kv_cache_events_received_total{"):
            counts[line.partition('type="')[2].partition('"')[0]] += int(float(line.rpartition(" ")[2]))
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare predictions for texts and chats with a real vLLM's figures.")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", type=Path, default=TEMPLATES / "hermes.jinja")
    parser.add_argument("--log", type=Path, default=Path("vllm.log"))
    given = parser.parse_args()
    started = time.monotonic()
    tallies, differences, events = run(given.requests, given.seed, given.template.resolve(), given.log)
    counted = ("count", "same", "both refuse", "differ", "prompt tokens", "cached tokens", "store helped")
    table = Table("keys.mode", "request", *counted, title="POST /v1/score and vLLM 0.32")
    for mode, kinds in tallies.items():
        for kind, tally in sorted(kinds.items()):
            differ = tally.requests - tally.same - tally.both_refuse
            figures = (tally.requests, tally.same, tally.both_refuse, differ, tally.prompt_tokens, tally.cached_tokens)
            table.add_row(mode, kind, *(f"{figure:,}" if figure else "" for figure in (*figures, tally.from_store)))
    Console(width=140).print(table)
    print(f"{given.requests} requests in {time.monotonic() - started:.0f} s; events: {events}")
    for difference in differences:
        print(difference)
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
