"""Tokens of kvatlas against those of real vLLM renderers, for the whole corpus of ``tests/models/chats.py``.

    tests/live/vllm.sh setup                            # once: several GB
    python -m tests.live.tokens_against_vllm            # some minutes on two cores
    python -m tests.live.tokens_against_vllm --record   # and write tests/data/chats/expected-*.jsonl

Starts ``vllm launch render`` for each variant of the tiny model, one after the other, asks ``/v1/chat/completions/render`` and
``/v1/completions/render`` for each request, and ``/tokenize`` for those that it can be asked (no truncation, no fields that it
does not have), and compares token for token. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from kvatlas.errors import TokenizationError
from kvatlas.tokens.local.huggingface import HuggingFaceTokenizer, load_huggingface
from tests.models.chats import (
    DATA,
    SEED,
    TEMPLATES,
    VARIANTS,
    Case,
    Variant,
    corpus,
    digest,
    fingerprint,
    prompt_of,
    tokens_of,
    write_model,
)

HOME = Path(os.environ.get("VLLM_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "real-vllm-0.32")
_NOT_OF_TOKENIZE = ("documents", "reasoning_effort", "tool_choice", "truncate_prompt_tokens", "truncation_side", "max_tokens")


@contextlib.contextmanager
def renderer(model: Path, variant: Variant, log: Path) -> Iterator[str]:
    """Run a renderer; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(HOME / "venv" / "bin" / "vllm"), "launch", "render", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", "--trust-request-chat-template"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    if variant.template:
        command += ["--chat-template", str(TEMPLATES / variant.template)]
    if variant.max_model_len:
        command += ["--max-model-len", str(variant.max_model_len)]
    quiet = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
    environment = os.environ | dict.fromkeys(quiet, "1") | {"PYTHONPATH": str(HOME / "shim")}
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        _wait(url, process, log)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    sys.exit(f"the renderer did not come up: see {log}")


def theirs(client: httpx.Client, case: Case) -> array[int] | int:
    """Return the renderer's tokens, or the status of its refusal."""
    route = "/v1/chat/completions/render" if case.is_chat else "/v1/completions/render"
    answer = _post(client, route, case)
    if answer.status_code != 200:
        return answer.status_code
    body = answer.json()
    return array("I", (body if case.is_chat else body[0])["token_ids"])


def of_tokenize(client: httpx.Client, case: Case) -> array[int] | None:
    """Return what /tokenize says; None where it can't be asked the same, or refuses."""
    if any(key in case.body for key in _NOT_OF_TOKENIZE) or "reasoning_content" in json.dumps(case.body):
        return None
    answer = _post(client, "/tokenize", case)
    return array("I", answer.json()["tokens"]) if answer.status_code == 200 else None


def ours(tokenizer: HuggingFaceTokenizer, case: Case, max_model_len: int | None) -> array[int] | TokenizationError:
    """Return our tokens, or our refusal."""
    try:
        return tokens_of(tokenizer, prompt_of(case), max_model_len)
    except TokenizationError as error:
        return error


def _post(client: httpx.Client, route: str, case: Case) -> httpx.Response:
    body = json.dumps({"model": "tiny", **case.body}).encode()  # ASCII: halves of surrogate pairs get through
    headers = {"Content-Type": "application/json"}
    try:
        return client.post(route, content=body, headers=headers)
    except httpx.TransportError:  # behind a status of 500 the renderer closes the connection
        return client.post(route, content=body, headers=headers)


def _record(variant: str, cases: list[Case], lines: list[dict[str, Any]]) -> None:
    about = {"engine": "vLLM 0.32.0 (vllm launch render)", "seed": SEED, "variant": variant, "requests": digest(cases)}
    file = DATA / "chats" / f"expected-{variant}.jsonl"
    file.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in [about, *lines]))


def compare(variant: str, cases: list[Case], counts: Counter[tuple[str, str, str]], *, record: bool) -> list[str]:
    """Ask one variant's renderer for all its requests; return what differs."""
    differences: list[str] = []
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        how = VARIANTS[variant]
        model = write_model(Path(scratch) / "tinymodel", how)
        template = (TEMPLATES / how.template).read_text() if how.template else None
        tokenizer = load_huggingface(model, name="tiny", revision=None, chat_template=template, trust_request_template=True)
        limit = how.max_model_len or tokenizer.max_model_len
        log = Path(tempfile.gettempdir()) / f"renderer-{variant}.log"
        with renderer(model, how, log) as url, httpx.Client(base_url=url, timeout=120) as client:
            for case in cases:
                right = theirs(client, case)
                mine = ours(tokenizer, case, limit)
                lines.append({"s": right} if isinstance(right, int) else {"n": len(right), "x": fingerprint(right)})
                verdict = _verdict(right, mine)
                counts[variant, case.name.split("/")[2], verdict] += 1
                if verdict not in ("same tokens", "both refuse"):
                    differences.append(f"{case.name}: {verdict}: {right!s:.120} / {mine!s:.200}")
                whole = None if isinstance(right, int) else of_tokenize(client, case)
                if whole is not None:
                    wide = ours(tokenizer, case, None)
                    verdict = _verdict(whole, wide)
                    counts[variant, "/tokenize", verdict] += 1
                    if verdict != "same tokens":
                        differences.append(f"{case.name}: /tokenize: {whole!s:.120} / {wide!s:.200}")
    if record:
        _record(variant, cases, lines)
    return differences


def _verdict(right: array[int] | int, mine: array[int] | TokenizationError) -> str:
    if isinstance(right, int):
        return "both refuse" if isinstance(mine, TokenizationError) else "only vLLM refuses"
    if isinstance(mine, TokenizationError):
        return "only we refuse"
    return "same tokens" if right == mine else "other tokens"


def main() -> None:
    """Compare all variants, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--record", action="store_true", help="write what the renderers answer to tests/data/chats")
    chosen = parser.parse_args()
    counts: Counter[tuple[str, str, str]] = Counter()
    differences: list[str] = []
    cases = corpus()
    for variant in chosen.variant or VARIANTS:
        differences += compare(variant, [case for case in cases if case.variant == variant], counts, record=chosen.record)
    verdicts = sorted({verdict for _, _, verdict in counts})
    table = Table("variant", "requests", *verdicts, title="kvatlas and vLLM 0.32")
    for variant, kind in sorted({(variant, kind) for variant, kind, _ in counts}):
        table.add_row(variant, kind, *(str(counts[variant, kind, verdict] or "") for verdict in verdicts))
    Console().print(table)
    for difference in differences:
        print(difference)
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
