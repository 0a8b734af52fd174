"""Against a real ``vllm launch render``: what RendererBackend returns is what the engine would work on, field by field.

    python -m tests.live.renderer_against_vllm [--port 8461]

Starts a renderer of the tiny model from the environment that tests/live/vllm.sh made (REAL_VLLM_HOME); needs no GPU. Its chat
template shows all that a request can give to one, so that a field that does not arrive is seen in the tokens.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
from tokenizers import Tokenizer

from kvatlas.config import RendererSettings
from kvatlas.errors import TokenizationError
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.remote.render import RendererBackend

MODEL = Path(__file__).parents[1] / "data" / "tinymodel"
HOME = Path(os.environ.get("REAL_VLLM_HOME", Path.home() / ".cache" / "real-vllm-0.32"))
MAX_MODEL_LEN = 1024
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}{% for name in ['tool_calls', 'tool_call_id', 'name', 'reasoning'] %}{% if message[name] %}
{{ name }}={{ message[name] | tojson }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if tools %}tools={{ tools | tojson }}{% endif %}{% if documents %}documents={{ documents | tojson }}{% endif %}
{%- if reasoning_effort %}effort={{ reasoning_effort }}{% endif %}{% if mood %}mood={{ mood }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
HI = {"role": "user", "content": "Good morning, what is new?"}


@contextmanager
def renderer(port: int) -> Iterator[str]:
    """Run ``vllm launch render`` for as long as the block lasts."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(HOME / "shim"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [HOME / "venv" / "bin" / "vllm", "launch", "render", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--chat-template", TEMPLATE, "--served-model-name", "tiny"]
    command += ["--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    process = subprocess.Popen(list(map(str, command)), env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise SystemExit(f"vllm ended with status {process.returncode}; run it by hand: {' '.join(map(str, command))}")
            try:
                httpx.get(f"{url}/health")
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                break
        yield url
    finally:
        process.terminate()
        process.wait(30)


class Check:
    """Runs checks and remembers how they went."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.backend = RendererBackend(RendererSettings(endpoints=(url,), timeout=30))  # type: ignore[arg-type]
        self.plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self.failed = 0

    def tokens(self, prompt: Prompt) -> list[int]:
        return list(self.backend.tokenize(prompt, 30).token_ids)

    def text(self, text: str) -> list[int]:
        return list(self.plain.encode(text, add_special_tokens=False).ids)

    def refused(self, prompt: Prompt) -> tuple[str, str]:
        try:
            self.backend.tokenize(prompt, 30)
        except TokenizationError as error:
            return error.reason.value, error.field
        return "answered", ""

    def asked(self, path: str, body: object) -> list[int]:
        """Return what the renderer says to a request as a client would send it to the engine."""
        answer = httpx.post(self.url + path, content=msgspec.json.encode(body), headers={"content-type": "application/json"})
        found = answer.json()
        return (found[0] if isinstance(found, list) else found)["token_ids"]

    def equal(self, name: str, found: Callable[[], object], wanted: object) -> None:
        try:
            value = found()
        except TokenizationError as error:
            value = error
        good = value == wanted
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name}" + ("" if good else f": {value!r:.300} instead of {wanted!r:.300}"))


def check(checks: Check) -> None:
    chat = ChatPrompt(model="tiny", messages=[HI])
    long = " the" * 2000
    words = checks.text("one two three four five six seven")

    def text(text: str, **more: object) -> TextPrompt:
        return TextPrompt(model="tiny", text=text, **more)  # type: ignore[arg-type]

    checks.equal("text", lambda: checks.tokens(text("one two three four five six seven")), words)
    checks.equal("text in many scripts", lambda: checks.tokens(text("Grüße, мир 🌍")), checks.text("Grüße, мир 🌍"))
    for side in ("left", "right"):
        cut = text("one two three four five six seven", truncation=Truncation(3, side))  # type: ignore[arg-type]
        checks.equal(f"cut on the {side}", lambda cut=cut: checks.tokens(cut), words[-3:] if side == "left" else words[:3])
    whole = text(" the" * (MAX_MODEL_LEN - 1))
    checks.equal("as long as can be", lambda: len(checks.tokens(whole)), MAX_MODEL_LEN - 1)
    checks.equal("one longer", lambda: checks.refused(text(" the" * MAX_MODEL_LEN)), ("too_many_tokens", "prompt"))
    checks.equal("far too long", lambda: checks.refused(text(long)), ("too_many_tokens", "prompt"))
    fitted = text(long, truncation=Truncation(-1, "right"))
    checks.equal("cut to what the model takes", lambda: len(checks.tokens(fitted)), MAX_MODEL_LEN - 1)
    checks.equal(
        "a long chat cut so",
        lambda: len(
            checks.tokens(
                ChatPrompt(model="tiny", messages=[{"role": "user", "content": long}], truncation=Truncation(-1, "left"))
            )
        ),
        MAX_MODEL_LEN - 1,
    )
    beyond = text("a b", truncation=Truncation(5000, "left"))
    checks.equal("cut to more than there is", lambda: checks.refused(beyond), ("refused", "truncate_prompt_tokens"))
    checks.equal("no text", lambda: checks.refused(text("")), ("refused", "prompt"))
    checks.equal("no such model", lambda: checks.refused(TextPrompt(model="other", text="x")), ("unknown_model", "model"))

    request = {"model": "tiny", "messages": [HI]}
    path = "/v1/chat/completions/render"
    checks.equal("chat", lambda: checks.tokens(chat), checks.asked(path, request))
    checks.equal(
        "chat by hand",
        lambda: checks.tokens(chat),
        checks.text(f"<|im_start|>user\n{HI['content']}<|im_end|>\n<|im_start|>assistant\n"),
    )
    tools = ChatPrompt(model="tiny", messages=[HI], tools=[TOOL], tool_choice="auto")
    checks.equal("chat with tools", lambda: checks.tokens(tools), checks.asked(path, {**request, "tools": [TOOL]}))
    named = {"type": "function", "function": {"name": "look"}}
    chosen = ChatPrompt(model="tiny", messages=[HI], tools=[TOOL], tool_choice=named)
    checks.equal(
        "with a tool chosen",
        lambda: checks.tokens(chosen),
        checks.asked(path, {**request, "tools": [TOOL], "tool_choice": named}),
    )
    answered = [
        HI,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
    ]
    checks.equal(
        "after a tool's answer",
        lambda: checks.tokens(ChatPrompt(model="tiny", messages=answered, tools=[TOOL])),
        checks.asked(path, {**request, "messages": answered, "tools": [TOOL]}),
    )
    salted = checks.asked(path, {**request, "cache_salt": "of a tenant"})
    checks.equal("a salt changes no token", lambda: checks.tokens(chat), salted)
    opened = {
        "messages": [HI, {"role": "assistant", "content": "Not"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    checks.equal(
        "a message to be continued",
        lambda: checks.tokens(ChatPrompt(model="tiny", **opened)),  # type: ignore[arg-type]
        checks.asked(path, {**request, **opened}),
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    checks.equal(
        "content in parts",
        lambda: checks.tokens(ChatPrompt(model="tiny", messages=parts)),
        checks.asked(path, {**request, "messages": parts}),
    )
    rich = ChatPrompt(
        model="tiny",
        messages=[HI],
        documents=[{"title": "t", "text": "x"}],
        reasoning_effort="low",
        chat_template_kwargs={"mood": "good"},
    )
    checks.equal(
        "documents, effort, template arguments",
        lambda: checks.tokens(rich),
        checks.asked(
            path,
            {
                **request,
                "documents": [{"title": "t", "text": "x"}],
                "reasoning_effort": "low",
                "chat_template_kwargs": {"mood": "good"},
            },
        ),
    )
    template = ChatPrompt(model="tiny", messages=[HI], chat_template="{{ messages }}")
    checks.equal("a template of its own", lambda: checks.refused(template), ("refused", "messages"))
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    pictured = ChatPrompt(model="tiny", messages=[{"role": "user", "content": [picture]}])
    checks.equal("an image for a model of texts", lambda: checks.refused(pictured), ("refused", "messages"))
    wrong = ChatPrompt(model="tiny", messages=[HI], reasoning_effort="enormous")
    checks.equal("a field that is wrong", lambda: checks.refused(wrong), ("refused", "reasoning_effort"))

    # /tokenize of the same server, as where render is not there.
    for endpoint in checks.backend._endpoints:
        endpoint.has_no_render()
    checks.equal("/tokenize: text", lambda: checks.tokens(text("one two three four five six seven")), words)
    checks.equal(
        "/tokenize: chat with tools",
        lambda: checks.tokens(ChatPrompt(model="tiny", messages=[HI], tools=[TOOL])),
        checks.asked(path, {**request, "tools": [TOOL]}),
    )
    checks.equal("/tokenize: as long as can be", lambda: len(checks.tokens(whole)), MAX_MODEL_LEN - 1)
    checks.equal("/tokenize: one longer", lambda: checks.refused(text(" the" * MAX_MODEL_LEN)), ("too_many_tokens", "prompt"))
    checks.equal("/tokenize: no text", lambda: checks.refused(text("")), ("refused", "prompt"))
    checks.equal("/tokenize: truncation", lambda: checks.refused(fitted), ("unsupported", "truncate_prompt_tokens"))
    checks.equal(
        "/tokenize: no such model", lambda: checks.refused(TextPrompt(model="other", text="x")), ("unknown_model", "model")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8461)
    with renderer(parser.parse_args().port) as url:
        checks = Check(url)
        check(checks)
    sys.exit(1 if checks.failed else 0)


if __name__ == "__main__":
    main()
