"""Against a real vLLM: predicts for each request how many tokens the engine will find cached, sends it, and compares.

Start vLLM so that it publishes its events, keeps them for replay, and reports cached tokens:

    vllm serve MODEL --port 8000 --enable-prompt-tokens-details --kv-events-config '{"enable_kv_cache_events": true,
      "publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5607", "topic": "kv@127.0.0.1:8000@MODEL"}'

    python examples/online_vllm.py --vllm http://127.0.0.1:8000 --events tcp://127.0.0.1:5557 --replay tcp://127.0.0.1:5607

Without a GPU: tests/live/vllm.sh sets up a vLLM that runs on a CPU. The engine should have nothing else to do meanwhile: what
other requests store or evict between the prediction and the answer cannot be known.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Any

import httpx

from kvatlas import Indexer, Query, load_config

TEXT = (
    "You answer questions about a railway museum. It has twelve locomotives, three of them in steam, a signal box from 1911, "
    "and a turntable that visitors may push. It opens at ten and closes at five, on Sundays at four. Children pay nothing. "
)
QUESTIONS = ("When do you close on Sundays?", "How many engines are in steam?", "What does a child pay?", "How old is the box?")


class Vllm:
    """The engine's HTTP API."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        self.model: str = self._ask("GET", "/v1/models")["data"][0]["id"]

    def tokens(self, text: str) -> list[int]:
        """Return the token ids that the engine would make of a text."""
        token_ids: list[int] = self._ask("POST", "/tokenize", {"model": self.model, "prompt": text})["tokens"]
        return token_ids

    def cached_tokens(self, token_ids: list[int]) -> int:
        """Send a request; return how much of it the engine found in its cache."""
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0}
        details = self._ask("POST", "/v1/completions", body)["usage"]["prompt_tokens_details"]
        if details is None:
            sys.exit("vLLM does not report cached tokens: start it with --enable-prompt-tokens-details")
        return details["cached_tokens"] or 0

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._http.request(method, path, json=body)
        answer.raise_for_status()
        return answer.json()


def prompts(engine: Vllm, count: int) -> list[list[int]]:
    """Return prompts that share beginnings, as chats do."""
    starts = [engine.tokens(f"Museum {number}. " + TEXT * 4) for number in range(3)]
    ends = [engine.tokens(f" {question}") for question in QUESTIONS]
    return [starts[number * 7 // 4 % 3] + ends[number % 4] + engine.tokens(f" {number}") for number in range(count)]


def caught_up(indexer: Indexer, timeout_s: float = 10.0) -> bool:
    """Wait until the index has what the engine has published; whether its pod can be trusted."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        indexer.sync()
        if any(pod.state == "fresh" for pod in indexer.pods()):
            return True
        time.sleep(0.05)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="http://127.0.0.1:8000", metavar="URL", help="the engine's HTTP address")
    parser.add_argument("--events", default="tcp://127.0.0.1:5557", metavar="ADDRESS", help="where it publishes events")
    parser.add_argument("--replay", default="tcp://127.0.0.1:5607", metavar="ADDRESS", help="where it answers replay requests")
    parser.add_argument("--requests", type=int, default=24, metavar="N")
    arguments = parser.parse_args()
    logging.getLogger("kvatlas").setLevel(logging.ERROR)

    engine = Vllm(arguments.vllm)
    address = f"{{endpoint: '{arguments.events}', replayEndpoint: '{arguments.replay}', model: '{engine.model}'}}"
    asked = prompts(engine, arguments.requests)
    engine.cached_tokens(asked[0])  # so that there is something to catch up with: a replay tells who the engine is
    exact = saved = 0
    with Indexer(load_config(overrides=[f"zmq.engines=[{address}]"])) as indexer:
        for number, token_ids in enumerate(asked, 1):
            if not caught_up(indexer):
                state = ", ".join(f"{pod.pod} {pod.state} {pod.stale_reason or ''}" for pod in indexer.pods())
                sys.exit(f"no trusted event stream after 10 s ({state}): are --events and --replay right? try kvatlas doctor")
            predicted = max(pod.predicted_cached_tokens for pod in indexer.score(Query(token_ids, engine.model)).pods)
            cached = engine.cached_tokens(token_ids)
            exact += predicted == cached
            saved += cached
            print(f"{number:4}  {len(token_ids):5} tokens  predicted {predicted:5}  cached {cached:5}  {predicted == cached}")
    print(f"{exact} of {arguments.requests} predictions exact; {saved} tokens were not computed again")
    return 0 if exact == arguments.requests else 1


if __name__ == "__main__":
    sys.exit(main())
