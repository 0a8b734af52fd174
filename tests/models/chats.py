"""Requests whose tokens a real vLLM and kvatlas must agree on: made from a seed, the same on every machine.

``tests/live/tokens_against_vllm.py`` asks real renderers for all of them and records what they answer;
``tests/golden/test_tokens_corpus.py`` compares with the records.
"""

# ruff: noqa: E501 - tables of requests read better with one in a line or two
from __future__ import annotations

import json
import random
import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from kvatlas.tokens.local.huggingface import HuggingFaceTokenizer
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.truncation import trim_text, truncate

SEED = 20261122
DATA = Path(__file__).parent.parent / "data"
TEMPLATES = DATA / "chats" / "templates"


class Variant(msgspec.Struct, frozen=True):
    """A way to run the tiny model. ``template`` None: its own. ``specials``: its tokenizer puts BOS and EOS around texts."""

    template: str | None = None
    specials: bool = False
    max_model_len: int | None = None


VARIANTS: Mapping[str, Variant] = {
    "own": Variant(),
    "hermes": Variant(template="hermes.jinja"),
    "llama": Variant(template="llama.jinja", specials=True, max_model_len=1500),
    "parts": Variant(template="parts.jinja", max_model_len=900),
    "documents": Variant(template="documents.jinja", specials=True),
}


class Case(msgspec.Struct, frozen=True):
    """A request: the body of a chat completion (it has messages) or of a completion."""

    variant: str
    name: str
    body: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        return "messages" in self.body


def corpus(seed: int = SEED) -> list[Case]:
    """Return all requests, in order."""
    cases: list[Case] = []
    for variant in VARIANTS:
        rng = random.Random(f"{seed}/{variant}")
        made = [*_chats(rng, variant), *_long(rng, variant), *_odd(rng), *_completions(rng, variant)]
        cases.extend(Case(variant, f"{variant}/{index}/{kind}", body) for index, (kind, body) in enumerate(made))
    return cases


def write_model(directory: Path, variant: Variant) -> Path:
    """Write the model that a variant runs; return its directory."""
    shutil.copytree(DATA / "tinymodel", directory, dirs_exist_ok=True)
    if variant.specials:
        file = directory / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        special = {
            token: {"id": token, "ids": [number], "tokens": [token]} for number, token in enumerate(("<|bos|>", "<|eos|>"))
        }
        around = [{"SpecialToken": {"id": token, "type_id": 0}} for token in special]
        text = {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [around[0], text, around[1]],
            "pair": [around[0], text, {"Sequence": {"id": "B", "type_id": 1}}, around[1]],
            "special_tokens": special,
        }
        file.write_text(json.dumps(tokenizer, ensure_ascii=False))
    return directory


def prompt_of(case: Case) -> Prompt:
    """Return a request as kvatlas takes it."""
    body = case.body
    truncation = None
    if body.get("truncate_prompt_tokens") is not None:
        truncation = Truncation(body["truncate_prompt_tokens"], body.get("truncation_side"))
    if not case.is_chat:
        return TextPrompt(
            model="tiny",
            text=body["prompt"],
            add_special_tokens=body.get("add_special_tokens", True),
            truncation=truncation,
            max_output_tokens=body.get("max_tokens", 16) or 0,
        )
    same = (
        "messages", "tools", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "add_generation_prompt",
        "continue_final_message", "add_special_tokens", "reasoning_effort",
    )  # fmt: skip
    return ChatPrompt(
        model="tiny",
        truncation=truncation,
        max_output_tokens=body.get("max_tokens") or 0,
        **{key: body[key] for key in same if key in body},
    )


def tokens_of(tokenizer: HuggingFaceTokenizer, prompt: Prompt, max_model_len: int | None) -> array[int]:
    """Return what the engine works on, or raise TokenizationError where it refuses the request."""
    assert tokenizer.text is not None
    text = tokenizer.prompt_text(prompt)
    text = trim_text(text, prompt.truncation, max_model_len, tokenizer.chars_per_token_max)
    tokens = tokenizer.text.encode(text).token_ids
    before, after = (tokenizer.text.before, tokenizer.text.after) if prompt.add_special_tokens else (array("I"), array("I"))
    return truncate(
        before + tokens + after,
        prompt.truncation,
        max_model_len,
        before=len(before),
        after=len(after),
        max_output_tokens=prompt.max_output_tokens,
    )


def digest(cases: list[Case]) -> str:
    """Return xxh3-64 over requests: what was recorded belongs to them."""
    return xxhash.xxh3_64_hexdigest(json.dumps([[case.name, case.body] for case in cases]).encode())


def fingerprint(token_ids: array[int] | list[int]) -> str:
    """Return xxh3-64 over token ids as little-endian 32-bit numbers."""
    return xxhash.xxh3_64_hexdigest(b"".join(token.to_bytes(4, "little") for token in token_ids))


# --- what people and programs write

_WORDS = [
    "the",
    "cache",
    "holds",
    "a",
    "prefix",
    "of",
    "every",
    "prompt",
    "that",
    "came",
    "before",
    "and",
    "blocks",
    "are",
    "evicted",
    "when",
    "memory",
    "runs",
    "out",
    "so",
    "routing",
    "must",
    "know",
    "which",
    "engine",
    "has",
    "what",
]
_TEXTS = (
    "Hello!",
    "Grüße aus Köln, naïve café, Ångström",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを",
    "天地玄黃宇宙洪荒",
    "다람쥐 헌 쳇바퀴에 타고파",
    "العربية من اليمين إلى اليسار",
    "עברית מימין לשמאל",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂🙃 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "e\u0301 a\u0308 n\u0303 Z͑ͫ̓a͝l̸g̷o",
    "<|im_start|>system\nnot a system message<|im_end|>",
    "<|im_start|", "|im_end|> <|eos|><|bos|> <|pad|>", "<|unknown|> </s> [INST] <think>x</think>",
    "{% raw %}{{ messages }}{% endraw %} {{ 7 * 7 }} {# no comment #}",
    "def f(x):\n\treturn {'a': [1, 2.5e-3], \"b\": None}  # comment\n\n\n",
    "SELECT * FROM t WHERE a <> 'x''y' -- \\n \\u0041",
    "  leading and trailing spaces  ", "\n\n\t \r\n", "\x00\x01\x7f\u200b\u2028\ufeff", "a" * 300, "1234567890" * 7,
    "CONTINUE_FINAL_MESSAGE_TAG here", "x-anthropic-billing-header: cch=1\nYou help.", "&lt;b&gt; <b> \"quotes\" 'single' \\",
    "",
)  # fmt: skip
_KINDS = ("string", "integer", "number", "boolean", "array", "object")

_Made = Iterator[tuple[str, dict[str, Any]]]


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(2, 30))).capitalize() + rng.choice(".?!\n")


def _said(rng: random.Random) -> str:
    return rng.choice(_TEXTS) if rng.random() < 0.5 else "".join(_sentence(rng) for _ in range(rng.randint(1, 3)))


def _parts(rng: random.Random, role: str) -> list[Any]:
    parts: list[Any] = []
    for _ in range(rng.randint(1, 4)):
        roll = rng.random()
        if roll < 0.7:
            part: dict[str, Any] = {"type": "text", "text": _said(rng)}
            if rng.random() < 0.3:
                part["cache_control"] = {"type": "ephemeral", "ttl": "5m"}
            if rng.random() < 0.1:
                part = {"text": part["text"], "zeta": 1, "type": "text", "alpha": [2]}
            parts.append(part)
        elif roll < 0.8 and role == "assistant":
            parts.append({"type": "refusal", "refusal": "I can't."})
        elif roll < 0.9 and role == "assistant":
            parts.append({"type": "thinking", "thinking": "Let me see.", "closed": True})
        else:
            parts.append({"type": "text", "text": ""})
    if rng.random() < 0.15:
        parts.append("a bare text")
    return parts


def _content(rng: random.Random, role: str, share_of_parts: float = 0.25) -> Any:
    return _parts(rng, role) if rng.random() < share_of_parts else _said(rng)


def _schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for index in range(rng.randint(0, 4)):
        kind = rng.choice(_KINDS)
        value: dict[str, Any] = {"type": kind, "description": rng.choice(_TEXTS)[:40]}
        if kind == "object" and depth < 3:
            value = _schema(rng, depth + 1)
        elif kind == "array":
            value["items"] = {"type": rng.choice(_KINDS[:4])}
        elif kind == "string" and rng.random() < 0.5:
            value["enum"] = ["a", "ü", "🙂"]
        properties[f"p{index}_{rng.choice(_WORDS)}"] = value
    return {"type": "object", "properties": properties, "required": list(properties)[:1], "additionalProperties": False}


def _tools(rng: random.Random, count: int) -> list[dict[str, Any]]:
    tools = []
    for index in range(count):
        function: dict[str, Any] = {"name": f"tool_{index}"}
        if rng.random() < 0.8:
            function = {"description": _said(rng)[:80], **function}
        if rng.random() < 0.9:
            function["parameters"] = _schema(rng)
        if rng.random() < 0.2:
            function["strict"] = rng.random() < 0.5
        if rng.random() < 0.1:
            function["unknown"] = 1
        tool: dict[str, Any] = {"function": function, "type": "function"}
        if rng.random() < 0.1:
            tool["defer_loading"] = True
        tools.append(tool)
    return tools


def _call(rng: random.Random, number: int) -> dict[str, Any]:
    arguments: Any = rng.choice(
        [
            json.dumps({"city": rng.choice(_TEXTS)[:20], "n": rng.randint(0, 9), "deep": {"b": [1, 2.5, None, True], "a": "x"}}),
            "{}", "", "[1, 2]", "not json", '"text"', json.dumps({"ü": "ä"}, ensure_ascii=False), '{"x": 1e400, "y": NaN}',
        ]
    )  # fmt: skip
    function = {"name": f"tool_{number}", "arguments": arguments}
    call: dict[str, Any] = {"type": "function", "function": function, "id": f"call_{number}"}
    if rng.random() < 0.2:
        call["index"] = number
        function["extra"] = True
    return call


def _turns(rng: random.Random, count: int, *, tools: bool) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        role = "developer" if rng.random() < 0.3 else "system"
        messages.append({"role": role, "content": _content(rng, role)})
        if role == "developer" and rng.random() < 0.3:
            messages[-1]["tools"] = _tools(rng, 2)
    while len(messages) < count:
        messages.append({"role": "user", "content": _content(rng, "user")})
        if rng.random() < 0.1:
            messages[-1]["name"] = "ann"
        answer: dict[str, Any] = {"role": "assistant", "content": _content(rng, "assistant")}
        if rng.random() < 0.2:
            answer[rng.choice(["reasoning", "reasoning_content"])] = _said(rng)
        if rng.random() < 0.05:
            answer["tool_calls"] = rng.choice([[], None])
        if tools and rng.random() < 0.5:
            calls = [_call(rng, number) for number in range(rng.choice([1, 1, 1, 2]))]
            answer = {"role": "assistant", "content": rng.choice([None, "", "I look it up."]), "tool_calls": calls}
            messages.append(answer)
            for call in calls:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": _content(rng, "tool", 0.4)})
        else:
            messages.append(answer)
        if rng.random() < 0.05:
            messages.append({"role": rng.choice(["developer", "system"]), "content": _said(rng)})
    return messages[:count]


def _chats(rng: random.Random, variant: str) -> _Made:
    for _ in range(90):
        with_tools = rng.random() < 0.5
        messages = _turns(rng, rng.choice([1, 1, 2, 3, 4, 5, 8, 12, 20, 30]), tools=with_tools)
        body: dict[str, Any] = {"messages": messages}
        if with_tools and rng.random() < 0.7:
            body["tools"] = _tools(rng, rng.choice([1, 1, 2, 3, 5, 20]))
            choice = rng.choice([..., "auto", "none", "none", None])
            if choice is not ...:
                body["tool_choice"] = choice
        if rng.random() < 0.15:
            body["add_generation_prompt"] = False
        if rng.random() < 0.15 and isinstance(messages[-1].get("content"), str):
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        if rng.random() < 0.2:
            body["add_special_tokens"] = True
        if rng.random() < 0.25:
            body["chat_template_kwargs"] = _kwargs(rng)
        if rng.random() < (0.6 if variant == "documents" else 0.1):
            body["documents"] = [{"title": _said(rng)[:20], "text": _said(rng)} for _ in range(rng.randint(0, 3))]
        if rng.random() < (0.4 if variant == "documents" else 0.05):
            body["reasoning_effort"] = rng.choice(["none", "low", "medium", "high"])
        yield "chat", body
    for template in _templates():
        yield "template", {"messages": _turns(rng, 4, tools=False), "chat_template": template}


def _kwargs(rng: random.Random) -> dict[str, Any]:
    choices: list[dict[str, Any]] = [
        {"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": None}, {"date_string": "1 Jan 2030"},
        {"date_string": "auto"}, {"date_string": None}, {"custom_tools": _tools(rng, 1)}, {"strip": True},
        {"add_generation_prompt": False}, {"tools": _tools(rng, 1)}, {"bos_token": "<BOS>"}, {"unused": [1, {"a": None}]},
        {"documents": [{"text": "from kwargs"}]}, {"reasoning_effort": "low"}, {"truncation": True, "max_length": 3},
        {"continue_final_message": True}, {"strict_turns": True},
    ]  # fmt: skip
    return rng.choice(choices) | (rng.choice(choices) if rng.random() < 0.3 else {})


def _templates() -> list[str]:
    return [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        "{{ bos_token }}{{ messages | length }} {{ messages[-1].content }} {{ tools }} {{ documents }}",
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}<{{ c.text }}>{% endfor %}"
        "{% endif %}{% endfor %}",
        "{% set rest = messages[1:] %}{% for m in rest %}{{ loop.index }}/{{ loop.length }}:{{ m['content'] | upper }};{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.last }}{{ m.content[:10] }}{{ loop.cycle('a', 'b') }}{% endfor %}",
        "{{ 'x' * 50 }}{{ 3 ** 4 }}{{ '%05d' % 7 }}{{ 'a' ~ 1 ~ none }}{{ [1] + [2] }}{{ namespace(a=1).a }}{{ dict(b=2) }}",
        "{{ messages[0].missing }}|{{ messages[0].get('missing') }}|{{ undefined_name }}",
        "{{ raise_exception('not today') }}",
        "{% for m in messages %}{{ m.content }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "",
        "{% macro show(body) %}{% for part in body %}({{ part }}){% endfor %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}"
        "{% endfor %}",
        "{% for m in messages recursive %}{{ m.role }}{% endfor %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }},{% endfor %}",
    ]


def _long(rng: random.Random, variant: str) -> _Made:
    limit = VARIANTS[variant].max_model_len or 4096
    for size in (limit // 6, limit // 3, limit, 2 * limit):
        text = " ".join(rng.choices([*_WORDS, *_TEXTS[:12]], k=size))
        messages = [{"role": "user", "content": text}]
        yield "long", {"messages": messages}
        for body in _truncations(rng, limit):
            yield "long", {"messages": messages} | body
            yield "long", {"prompt": text} | body
    huge = "".join(_sentence(rng) for _ in range(limit))
    for body in ({}, {"truncate_prompt_tokens": 50, "truncation_side": "left"}, {"truncate_prompt_tokens": -1}):
        yield "huge", {"prompt": huge} | body
    yield "huge", {"prompt": huge, "truncate_prompt_tokens": limit, "truncation_side": "right"}


def _truncations(rng: random.Random, limit: int) -> list[dict[str, Any]]:
    sizes = rng.sample([-1, 0, 1, 2, 3, 17, limit // 2, limit - 1, limit, limit + 1], 5)
    bodies: list[dict[str, Any]] = []
    for size in sizes:
        body: dict[str, Any] = {"truncate_prompt_tokens": size}
        side = rng.choice([None, "left", "right"])
        if side:
            body["truncation_side"] = side
        if rng.random() < 0.4:
            body["add_special_tokens"] = rng.random() < 0.5
        if rng.random() < 0.4:
            body["max_tokens"] = rng.choice([1, 5, limit, limit + 1])
        bodies.append(body)
    return bodies


def _completions(rng: random.Random, variant: str) -> _Made:
    limit = VARIANTS[variant].max_model_len or 4096
    for text in _TEXTS:
        yield "completion", {"prompt": text}
        yield "completion", {"prompt": text, "add_special_tokens": False}
    for _ in range(8):
        text = "".join(_said(rng) for _ in range(rng.randint(1, 12)))
        for body in _truncations(rng, limit)[:2]:
            yield "completion", {"prompt": text} | body


_USER: dict[str, Any] = {"role": "user", "content": "hi"}
_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def _odd(rng: random.Random) -> _Made:
    """Yield requests at the edge of what the engine takes."""
    messages: list[Any] = [
        {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": 5}, {"role": "user", "content": []},
        {"role": "user", "content": ["a", "b"]}, {"role": "user", "content": {"type": "text", "text": "t"}},
        {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "weird"}]}, {"role": "user", "content": [{"text": "a"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"role": "user", "content": [{}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "weird", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "uuid": "u"}]}, {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "refusal", "refusal": "no"}, "b"]}, {"role": "user", "content": [None]},
        {"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}, {"role": "user", "content": "x", "name": 5},
        {"role": "weird", "content": "x"}, {"role": "", "content": "x"}, {"role": 5, "content": "x"}, {"content": "x"},
        {"role": "weird", "content": ["a", "b"]}, {"role": "weird", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "weird", "content": None}, {"role": "function", "content": "x", "name": "f"},
        {"role": "function", "content": None, "name": "f"}, "text", 5, None, {},
        {"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "x", "tool_calls": [5]}, {"role": "assistant", "tool_calls": [{**_CALL, "type": "custom"}]},
        {"role": "assistant", "tool_calls": [{key: _CALL[key] for key in ("id", "type")}]}, {"role": "assistant", "tool_calls": 5},
        {"role": "assistant", "tool_calls": [{key: _CALL[key] for key in ("type", "function")}]},
        {"role": "assistant", "tool_calls": [{**_CALL, "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "tool_calls": [{**_CALL, "function": {"name": "f", "arguments": "[" * 3000}}]},
        {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "q", "tool_calls": [_CALL]},
        {"role": "assistant", "content": "x", "reasoning": 5}, {"role": "assistant", "content": ["a"]},
        {"role": "tool", "content": "x"}, {"role": "tool", "content": "x", "tool_call_id": 5}, {"role": "tool", "tool_call_id": "c"},
        {"role": "tool", "content": [{"type": "tool_reference", "name": "f"}], "tool_call_id": "c"},
        {"role": "tool", "content": [{"type": "tool_reference"}, {"type": "text", "text": "t"}], "tool_call_id": "c"},
        {"role": "tool", "content": "x", "tool_call_id": "c", "name": 5}, {"role": "developer", "content": "x", "tools": [_TOOL]},
        {"role": "developer", "content": "x", "tools": 5}, {"role": "user", "content": "a\ud800b"}, {"role": "user", "content": "\udc00"},
        {"role": "system", "content": "x-anthropic-billing-header: cch=2"},
        {"role": "system", "content": [{"type": "text", "text": "x-anthropic-billing-header: cch=3\nrest"}]},
    ]  # fmt: skip
    for message in messages:
        yield "odd message", {"messages": [_USER, message]}
    bodies: list[dict[str, Any]] = [
        {"messages": []}, {"messages": "hi"}, {"messages": {"role": "user"}}, {"tools": []}, {"tools": "x"}, {"tools": [5]},
        {"tools": [{"type": "custom", "function": {"name": "f"}}]}, {"tools": [{"function": {"name": "f"}}]},
        {"tools": [{"type": "function"}]}, {"tools": [{**_TOOL, "function": {"name": 5}}]}, {"tool_choice": "auto"},
        {"tools": [{**_TOOL, "function": {"name": "f", "parameters": []}}]}, {"tools": [_TOOL], "tool_choice": "other"},
        {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, {"tools": [_TOOL], "tool_choice": {}},
        {"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [_TOOL], "tool_choice": "required"}, {"tools": [_TOOL], "tool_choice": "none"},
        {"continue_final_message": True}, {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "add_generation_prompt": False}, {"documents": [{"text": 5}]}, {"documents": "x"},
        {"documents": []}, {"reasoning_effort": "huge"}, {"reasoning_effort": "none"}, {"chat_template_kwargs": []},
        {"chat_template_kwargs": {"messages": []}}, {"chat_template_kwargs": {"tools": 5}},
        {"chat_template_kwargs": {"documents": ["x"]}}, {"chat_template_kwargs": {"conversation": 1}},
        {"chat_template_kwargs": {"return_assistant_tokens_mask": True}}, {"chat_template_kwargs": {"return_dict": True}},
        {"chat_template_kwargs": {"chat_template": "K {{ messages[0].content }}"}},
        {"chat_template_kwargs": {"chat_template": "K"}, "chat_template": "R"}, {"truncate_prompt_tokens": -2},
        {"truncate_prompt_tokens": 3}, {"messages": [{"role": "user", "content": ""}]},
        {"messages": [_USER, {"role": "assistant", "content": "  to go on  "}], "continue_final_message": True,
         "add_generation_prompt": False},
        {"messages": [_USER, {"role": "assistant", "content": [{"type": "text", "text": "go on "}]}],
         "continue_final_message": True, "add_generation_prompt": False},
        {"messages": [_USER, {"role": "assistant", "content": ""}], "continue_final_message": True,
         "add_generation_prompt": False},
        {"messages": [_USER, {"role": "assistant", "tool_calls": [_CALL]}], "continue_final_message": True,
         "add_generation_prompt": False},
    ]  # fmt: skip
    for body in bodies:
        yield "odd request", {"messages": [_USER]} | body
