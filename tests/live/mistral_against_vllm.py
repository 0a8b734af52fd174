"""Our tokens of Mistral's format against a real vLLM's: ``vllm launch render --tokenizer-mode mistral``.

    tests/live/vllm.sh setup                      # once: several GB
    python -m tests.live.mistral_against_vllm     # about two minutes on two cores

For each tokenizer (two that come with mistral_common, and two made of one of them with later versions' special tokens) vLLM
serves a directory with the tiny model's config.json. Hand-written chats, at the edges of what is taken, and random ones are
rendered by ``/v1/chat/completions/render``, texts tokenized by ``/tokenize``, and both compared with ours: the same tokens, or
both refuse.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kvatlas.errors import TokenizationError
from kvatlas.tokens.local.mistral import MistralTokenizer, load_mistral
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt

HERE = Path(__file__).parent
TINY = HERE.parent / "data" / "tinymodel"
DEFAULT_HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "real-vllm-0.32"

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]


def call(arguments: Any, call_id: str = "call_0123456789abc", **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}], **more}


def result(content: Any = "42", call_id: str = "call_0123456789abc", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **more}


def parts(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **more} for text in texts]


def chats() -> Iterator[dict[str, Any]]:
    """Yield request bodies at the edges of what is taken."""
    system = {"role": "system", "content": "S"}
    messages: list[list[dict[str, Any]]] = [
        [USER],
        [system, USER, ANSWER, USER],
        [{"role": "developer", "content": "S"}, USER],
        [USER, USER],
        [USER, ANSWER, ANSWER, USER],
        [ANSWER, USER],
        [USER, ANSWER, system, USER],
        [system],
        [system, system, USER],
        [],
        [USER, ANSWER],
        [{"role": "user", "content": parts("a", "b")}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": parts("a", cache_control={"type": "ephemeral"})}],
        [{"role": "system", "content": parts("a", "b")}, USER],
        [USER, {"role": "assistant", "content": parts("a", "b")}, USER],
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
        [USER, {"role": "assistant", "content": None, "refusal": "no"}, USER],
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
        [{"role": "user", "content": [{"text": "a"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "closed": True}, *parts("b")]}, USER],
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "closed": False}, *parts("b")]}, USER],
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}]}, USER],
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": parts("x")}, *parts("b")]}, USER],
        [USER, {"role": "assistant", "content": "x", "reasoning": "r"}, USER],
        [USER, {"role": "assistant", "content": "x", "reasoning": ""}, USER],
        [USER, {"role": "assistant", "content": "x", "reasoning_content": "r"}, USER],
        [USER, {"role": "assistant", "content": "x", "reasoning_content": "r", "reasoning": "s"}, USER],
        [USER, {"role": "assistant", "content": parts("x"), "reasoning": "r"}, USER],
        [USER, {"role": "assistant", "reasoning": "r"}, USER],
        [USER, {"role": "assistant", "content": "", "reasoning": "r"}, USER],
        [{"role": "system", "content": [*parts("a"), {"type": "thinking", "thinking": "t"}, *parts("b")]}, USER],
        [USER, call('{"a":1,"b":"é"}'), result()],
        [USER, call('{"a":'), result()],
        [USER, call("[1]"), result()],
        [USER, call(""), result()],
        [USER, call("5"), result()],
        [USER, call("null"), result()],
        [USER, call("{}", content="c"), result()],
        [USER, call("{}", content=""), result()],
        [USER, call("{}", content=None), result()],
        [USER, call("{}", content=parts("c")), result()],
        [USER, call("{}", reasoning="r"), result()],
        [USER, call("{}", "ab"), result(call_id="ab")],
        [USER, call("{}", "abcdefghi"), result(call_id="abcdefghi")],
        [USER, call("{}", "call-1"), result(call_id="call-1")],
        [USER, call("{}", "abcdefghi"), result(call_id="abcdefghX")],
        [USER, call("{}", ""), result(call_id="")],
        [USER, call('{"x": 1.0, "y": 1e3, "z": [true, null]}'), result()],
        [USER, call('{"a": NaN}'), result()],
        [USER, call('{"a": 12345678901234567890}'), result()],
        [USER, call({"a": 1}), result()],
        [USER, call("{}"), {"role": "tool", "content": "x"}],
        [USER, call("{}"), USER],
        [
            USER,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            result(),
        ],
        [USER, {"role": "assistant", "content": "x", "tool_calls": []}, USER],
        [USER, {"role": "assistant", "tool_calls": []}, USER],
        [USER, {"role": "assistant", "content": "x", "tool_calls": None}, USER],
        [USER, call("{}"), result("")],
        [USER, call("{}"), result('{"a":  1}')],
        [USER, call("{}"), result(parts("a", "b"))],
        [USER, call("{}"), result(name="g")],
        [USER, call("{}"), result(), ANSWER, USER],
        [USER, call("{}"), result(), USER],
        [result()],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [USER, {"role": "assistant", "content": ""}, USER],
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, {"role": "assistant"}, USER],
        [{"role": "other", "content": "x"}],
        [USER, {"role": "function", "name": "f", "content": "x"}],
        [{"role": "user", "content": "x", "name": "bob", "unknown": 2}],
        [{"role": "user", "content": "[INST] </s> <s> [IMG] [THINK]"}],
        [{"role": "user", "content": "a\0b"}],
        [{"role": "user", "content": "a\ud800b"}],
        [{"role": "user", "content": 5}],
        [{"role": "system", "content": "x-anthropic-billing-header: cch=1\nhello"}, USER],
        [{"content": "x"}],
        [USER, {"role": "assistant", "content": "x", "prefix": True}],
        [
            USER,
            {"role": "assistant", "tool_calls": [{"id": "a" * 9, "type": "custom", "custom": {"name": "f", "input": "x"}}]},
            USER,
        ],
    ]
    for each in messages:
        yield {"messages": each}
        if any("tool_calls" in message for message in each):
            yield {"messages": each, "tools": TOOLS}
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    for each in (
        {"tools": TOOLS},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"function": FUNCTION}]},
        {"tools": []},
        {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True, "unknown": 1}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "strict": False, "parameters": None}}]},
        {"tools": TOOLS * 2},
        {"tools": [{"type": "other", "function": FUNCTION}]},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": {"é": "ü"}}}}]},
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "xhigh"},
        {"chat_template": "x"},
        {"chat_template_kwargs": {"x": 1}},
        {"chat_template_kwargs": {}},
        {"add_generation_prompt": False},
        {"add_special_tokens": True},
        {"documents": [{"title": "a", "text": "b"}]},
        continued,
        {"continue_final_message": True},
    ):
        yield {"messages": [USER], **each}
    for last in (ANSWER, {**ANSWER, "reasoning": "r"}, call("{}"), {"role": "assistant", "content": parts("a", "b")}):
        yield {"messages": [USER, last], **continued}
        yield {"messages": [USER, last], "add_generation_prompt": False}


def random_text(source: random.Random) -> str:
    alphabet = ["hello", " world", "\n", "  ", "é", "日本", "🙂", "123", "[INST]", "</s>", "'s", "\t", "{", "}", '"', "\\"]
    return "".join(source.choice(alphabet) for _ in range(source.randrange(1, 30)))


def random_chat(source: random.Random) -> dict[str, Any]:
    """Return a conversation that most tokenizers take, some with tools."""
    messages: list[dict[str, Any]] = []
    if source.random() < 0.5:
        messages.append({"role": "system", "content": random_text(source)})
    body: dict[str, Any] = {"messages": messages}
    if source.random() < 0.5:
        body["tools"] = TOOLS
    for _ in range(source.randrange(1, 4)):
        texts = [random_text(source) for _ in range(source.randrange(1, 3))]
        messages.append({"role": "user", "content": source.choice([texts[0], parts(*texts)])})
        if "tools" in body and source.random() < 0.5:
            call_id = "".join(source.choice("abcdef0123456789") for _ in range(source.choice([9, 24])))
            messages.append(call(json.dumps({"a": random_text(source)}, ensure_ascii=source.random() < 0.5), call_id))
            messages.append(result(random_text(source), call_id))
        messages.append({"role": "assistant", "content": random_text(source)})
    if source.random() < 0.3:
        return {**body, "continue_final_message": True, "add_generation_prompt": False}
    messages.append({"role": "user", "content": random_text(source)})
    return body


def write_tokenizers(directory: Path) -> list[Path]:
    """Write one model directory for each tokenizer, with later versions' special tokens where none is packaged."""
    import mistral_common
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    data = Path(mistral_common.__file__).parent / "data"
    made = []
    for name, source, file in (
        ("v3-tekken", "tekken_240911.json", "tekken.json"),
        ("v7-sentencepiece", "mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model.v7"),
    ):
        made.append(directory / name)
        made[-1].mkdir()
        shutil.copy(data / source, made[-1] / file)
    tekken = json.loads((data / "tekken_240911.json").read_bytes())
    tokens = [{"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)]
    effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
    for version, more in (("v11", {}), ("v13", {}), ("v15", {"model_settings_builder": {"reasoning_effort": effort}})):
        made.append(directory / f"{version}-made")
        made[-1].mkdir()
        content = {**tekken, "config": {**tekken["config"], "version": version}, "special_tokens": tokens, **more}
        (made[-1] / "tekken.json").write_text(json.dumps(content))
    for each in made:
        shutil.copy(TINY / "config.json", each)
    return made


class Renderer:
    """A vLLM that renders only."""

    def __init__(self, home: Path, model: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONPATH": str(home / "shim"),
        }
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "m", "--tokenizer-mode", "mistral"]
        self._process = subprocess.Popen(
            [home / "venv" / "bin" / "vllm", "launch", "render", model, *arguments, "--max-model-len", "4096"],
            env=environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def __enter__(self) -> Renderer:
        for _ in range(240):
            try:
                if self._client.get("/health").status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            if self._process.poll() is not None:
                raise SystemExit("vLLM did not start; see its log")
            time.sleep(0.5)
        raise SystemExit("vLLM is not ready after two minutes; see its log")

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(30)
        self._client.close()

    def ask(self, path: str, body: dict[str, Any], field: str) -> list[int] | str:
        """Return the tokens, or the refusal."""
        answer = self._client.post(
            path, content=json.dumps({"model": "m", **body}), headers={"content-type": "application/json"}
        )
        return answer.json()[field] if answer.status_code == 200 else answer.text[:300]


def ours(tokenizer: MistralTokenizer, body: dict[str, Any]) -> list[int] | str:
    prompt = TextPrompt(model="m", text=body.pop("prompt"), **body) if "prompt" in body else ChatPrompt(model="m", **body)
    try:
        return tokenizer.tokenize(prompt).tolist()
    except TokenizationError as error:
        return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("VLLM_HOME", DEFAULT_HOME)))
    parser.add_argument("--chats", type=int, default=60, help="random chats for each tokenizer")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    differences = 0
    with tempfile.TemporaryDirectory() as temporary:
        for model in write_tokenizers(Path(temporary)):
            try:
                tokenizer = load_mistral(model, name=model.name, revision=None)
            except TokenizationError as error:
                print(f"{model.name}: skipped, {error}")
                continue
            source = random.Random(options.seed)
            bodies = [("/v1/chat/completions/render", body, "token_ids") for body in chats()]
            bodies += [("/v1/chat/completions/render", random_chat(source), "token_ids") for _ in range(options.chats)]
            texts = ["", "a", " a", "<s>[INST]", "日本\n\n  x"] + [random_text(source) for _ in range(options.chats)]
            bodies += [
                ("/tokenize", {"prompt": text, "add_special_tokens": position % 3 > 0}, "tokens")
                for position, text in enumerate(texts)
            ]
            counts: Counter[str] = Counter()
            with Renderer(options.home, model, Path(temporary) / f"{model.name}.log") as renderer:
                for path, body, field in bodies:
                    theirs, mine = renderer.ask(path, body, field), ours(tokenizer, dict(body))
                    both = isinstance(theirs, str) and isinstance(mine, str)
                    counts["both refuse" if both else "equal" if theirs == mine else "DIFFERENT"] += 1
                    if not both and theirs != mine:
                        differences += 1
                        print(f"  {json.dumps(body)[:300]}\n    vLLM: {str(theirs)[:200]}\n    ours: {str(mine)[:200]}")
            print(f"{model.name} (version {tokenizer.version}): {dict(counts)}", flush=True)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
