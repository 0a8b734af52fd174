"""Whatever is sent as a prompt, the answer is one of ours: 200, or a refusal that names field, problem and remedy.

No prompt fails inside (500) or keeps its caller waiting. Requests go to the HTTP app in this process, with the tiny model's
tokenizer and with templates from requests trusted; half of the pairs that make a surrogate, NaN and numbers beyond 64 bits are
written as Python's json writes them.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from kvatlas.config import load_config
from kvatlas.errors import TokenizationError
from kvatlas.tokens.local import template_bounds
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt, Truncation
from kvatlas.tokens.results import Tokenized
from kvatlas.tokens.setup import make_local
from tests.integration.test_http import app_of
from tests.models.chats import DATA

EXAMPLES = 150 * int(os.environ.get("KVATLAS_EXAMPLES_FACTOR", "1"))
MODEL = "tiny"
SETTINGS = (f"tokens.models.{MODEL}={DATA / 'tinymodel'}", "tokens.trustRequestTemplate=true")
ANSWER_S = 20
ROUTES = ("/v1/score", "/v1/candidates", "/v1/locality", "/score_completions", "/score_chat_completions")
HI = {"role": "user", "content": "hi"}
LAST = {"role": "assistant", "content": "and so"}


class Service:
    """The HTTP app, and a loop that it runs in."""

    def __init__(self) -> None:
        self._app, self._indexer = app_of(*SETTINGS)
        self._loop = asyncio.Runner()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://test")
        assert self.post("/v1/score", {"model": MODEL, "text": "loads the tokenizer"}).status_code == 200

    def post(self, route: str, body: object) -> httpx.Response:
        """Send bytes as they are, anything else as JSON. Raises what fails inside; TimeoutError where no answer comes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._loop.run(asyncio.wait_for(self._client.post(route, content=content), ANSWER_S))


@functools.cache
def service() -> Service:
    return Service()


@functools.cache
def backend() -> LocalBackend:
    return make_local(load_config(environ={}, overrides=SETTINGS).tokens)


def check(route: str, body: object) -> httpx.Response:
    """Send a body; check that the answer is one of ours, and return it."""
    answer = service().post(route, body)
    if answer.status_code == 200:
        return answer
    assert 400 <= answer.status_code < 500 or answer.status_code in (501, 503), answer.text
    error = answer.json()["error"]
    assert isinstance(error["field"], str)  # "" where an unknown field has no name
    assert all(isinstance(error[name], str) and error[name] for name in ("problem", "remedy")), error
    assert len(answer.content) < 20_000, "a refusal does not repeat what was sent"
    return answer


# -- bodies ------------------------------------------------------------------------------------------------------------------

FUNCTION = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
CALL = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind.", "tools": [{"type": "function", "function": FUNCTION}]},
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "refusal", "refusal": "no"}], "name": "eva"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "call-1", "content": "blue"},
        {"role": "assistant", "content": "It is"},
    ],
    "tools": [{"type": "function", "function": FUNCTION, "defer_loading": False}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "documents": [{"title": "a", "text": "b"}],
    "chat_template": None,
    "chat_template_kwargs": {"enable_thinking": True, "custom": [1, {"a": None}]},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "reasoning_effort": "low",
    "max_tokens": 7,
    "max_completion_tokens": 9,
    "truncate_prompt_tokens": 20,
    "truncation_side": "left",
    "cache_salt": "salt",
}
COMPLETION: dict[str, Any] = {
    "prompt": "Once upon a time",
    "add_special_tokens": True,
    "max_tokens": 16,
    "truncate_prompt_tokens": 3,
    "truncation_side": "right",
    "cache_salt": "salt",
}
TOKENIZE: dict[str, Any] = {"policy": "within", "budget_ms": 5, "on_failure": "unscored"}
ABOUT: dict[str, Any] = {"model": MODEL, "lora_name": None, "pods": ["a"]}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/score", {**ABOUT, "chat": CHAT}),
    "completion": ("/v1/candidates", {**ABOUT, "completion": COMPLETION}),
    "text": ("/v1/locality", {**ABOUT, "text": "Once upon a time"}),
    "chat, unscored": ("/v1/score", {**ABOUT, "chat": CHAT, "tokenize": TOKENIZE}),
    "text, stored": ("/v1/score", {**ABOUT, "text": "Once upon a time", "tokenize": {**TOKENIZE, "policy": "stored"}}),
    "llm-d, completion": ("/score_completions", {"model": MODEL, **COMPLETION}),
    "llm-d, chat": ("/score_chat_completions", {"model": MODEL, **CHAT}),
    "llm-d, conversation": ("/score_chat_completions", {"model": MODEL, "conversation": CHAT["messages"]}),
}

ODD: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -2,
    "beyond 32 bits": 2**40,
    "beyond 64 bits": 10**30,
    "beyond a float": 10**400,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "empty text": "",
    "NUL": "\0",
    "half a surrogate pair": "a\ud800b",
    "controls": "\x1b[2J\r\n\x7f\u2028\ufeff\uffff",
    "marks of special tokens": "<|im_start|>system\n<|im_end|><|eos|>",
    "long text": "x " * 500,
    "empty list": [],
    "empty object": {},
    "nested list": [[[]]],
    "mixed list": [None, 1, "a", {}],
    "odd keys": {"": 1, "\0": 2, "__class__": 3, "a" * 300: 4, "messages": 5, "self": 6},
}


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Return the paths to all values within one."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def put(body: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Put a value in place of another one, or drop that (``...``)."""
    for step in path[:-1]:
        body = body[step]
    if value is ...:
        del body[path[-1]]
    else:
        body[path[-1]] = copy.deepcopy(value)  # odd values are shared, and spoilt further


texts = st.text(st.characters(), max_size=30) | st.sampled_from([value for value in ODD.values() if isinstance(value, str)])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    texts,
    st.sampled_from([*ODD.values()]),
)
names = texts | st.sampled_from(["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "uuid"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


@st.composite
def bodies(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(BODIES)) -> tuple[str, dict[str, Any]]:
    """Return a route, and a body for it with up to four values exchanged, dropped or added."""
    route, body = copy.deepcopy(BODIES[draw(st.sampled_from(kinds))])
    for _ in range(draw(st.integers(1, 4))):
        paths = list(places(body))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        if draw(st.integers(0, 4)) == 0:
            path = (*path[:-1], draw(names)) if isinstance(path[-1], str) else path
        put(body, path, draw(values))
    return route, body


# -- over HTTP ---------------------------------------------------------------------------------------------------------------


def test_the_bodies_that_are_spoilt_below_are_good_ones() -> None:
    for route, body in BODIES.values():
        assert check(route, body).status_code == 200, body


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", BODIES)
def test_an_odd_value_in_any_place_is_taken_or_refused(kind: str, odd: str) -> None:
    route, body = BODIES[kind]
    for path in places(body):
        spoilt = copy.deepcopy(body)
        put(spoilt, path, ODD[odd])
        check(route, spoilt)


@pytest.mark.parametrize("kind", BODIES)
def test_a_place_that_is_missing_is_taken_or_refused(kind: str) -> None:
    route, body = BODIES[kind]
    for path in places(body):
        spoilt = copy.deepcopy(body)
        put(spoilt, path, ...)
        check(route, spoilt)


@given(asked=bodies())
@settings(max_examples=EXAMPLES * 4, deadline=None)
def test_whatever_a_caller_makes_of_a_request_has_an_answer(asked: tuple[str, dict[str, Any]]) -> None:
    check(*asked)


@given(route=st.sampled_from(ROUTES), form=st.sampled_from(["chat", "completion", "text", "tokenize", "prompt"]), value=values)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_json_as_a_prompt_has_an_answer(route: str, form: str, value: Any) -> None:
    check(route, {"model": MODEL, form: value})


@given(route=st.sampled_from(ROUTES), body=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_have_an_answer(route: str, body: bytes) -> None:
    check(route, body)


def nested(depth: int, opening: str, inner: str, closing: str) -> bytes:
    return (opening * depth + inner + closing * depth).encode()


DEEP: dict[str, Callable[[bytes], bytes]] = {
    "a content": lambda deep: b'{"messages": [{"role": "user", "content": %b}]}' % deep,
    "a message": lambda deep: b'{"messages": [%b]}' % deep,
    "a field that is not looked at": lambda deep: b'{"messages": [{"role": "user", "content": "a", "x": %b}]}' % deep,
    "a reasoning that is continued": lambda deep: (
        b'{"messages": [{"role": "assistant", "content": "a", "reasoning": %b}], "continue_final_message": true,'
        b' "add_generation_prompt": false}' % deep
    ),
    "a part": lambda deep: b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": %b}]}]}' % deep,
    "tools": lambda deep: b'{"messages": [{"role": "user", "content": "a"}], "tools": [%b]}' % deep,
    "parameters": lambda deep: (
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ tools | tojson }}",'
        b' "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": %b}}}]}' % deep
    ),
    "documents": lambda deep: b'{"messages": [{"role": "user", "content": "a"}], "documents": [{"a": %b}]}' % deep,
    "arguments of templates": lambda deep: (
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ a | tojson }}",'
        b' "chat_template_kwargs": {"a": %b}}' % deep
    ),
    "arguments of a call": lambda deep: (
        b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",'
        b' "function": {"name": "f", "arguments": "{\\"a\\": %b}"}}]}], "chat_template": "{{ messages | tojson }}"}'
        % deep.replace(b'"', b'\\"')
    ),
}


@pytest.mark.parametrize("depth", [60, 300, 600, 900, 1100, 5000, 200_000])
@pytest.mark.parametrize("where", DEEP)
def test_deep_values_are_taken_or_refused(where: str, depth: int) -> None:
    for deep in (nested(depth, "[", "1", "]"), nested(depth, '{"a":', "1", "}"), b"[" * depth):
        for more in (b"", b', "tokenize": {"on_failure": "unscored"}'):
            check("/v1/score", b'{"model": "%b", "chat": %b%b}' % (MODEL.encode(), DEEP[where](deep), more))
        check("/score_chat_completions", b'{"model": "%b", %b' % (MODEL.encode(), DEEP[where](deep)[1:]))


def test_megabytes_are_answered() -> None:
    big = "a b " * 1_500_000
    for body in (
        {"text": big},
        {"text": "a" * 7_000_000},
        {"completion": {"prompt": big, "truncate_prompt_tokens": 10}},
        {"completion": {"prompt": big, "truncate_prompt_tokens": 10, "truncation_side": "left"}},
        {"chat": {"messages": [{"role": "user", "content": big}]}},
        {"chat": {"messages": [HI] * 100_000}},
        {"chat": {"messages": [HI], "tools": [{"type": "function", "function": {"name": "f", "description": big}}]}},
        {"chat": {"messages": [HI], "chat_template_kwargs": {str(number): number for number in range(200_000)}}},
        {"chat": {"messages": [HI], "chat_template": big}},
    ):
        check("/v1/score", {"model": MODEL, **body})


# -- templates from requests -------------------------------------------------------------------------------------------------

TOO_MUCH = {
    "a loop over a huge range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a macro": "{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "loops behind a filter": "{% filter upper %}{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}"
    "{% endfor %}{% endfilter %}",
    "loops in a value": "{% set x %}{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}"
    "{% endset %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that doubles": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([i]) }}{% endfor %}",
    "a huge text": "{{ 'a' * 10**9 }}",
    "a huge list": "{{ [1] * 10**9 }}",
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a text added to itself": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a number that squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a huge power": "{{ 9 ** 9 ** 9 }}{{ 2 ** (10 ** 9) }}",
    "a call that writes much": "{{ lipsum(n=10**5) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a width in an argument": "{{ '%*d' % (1000000000, 1) }}",
}
NOT_ALLOWED = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by name": "{{ ''['__class__']['__mro__'] }}",
    "code of a method": "{{ messages.append.__self__ }}",
    "another file": "{% include '/etc/passwd' %}",
    "another template": "{% extends 'base' %}",
    "an import": "{% import 'os' as os %}{{ os.listdir() }}",
    "changes to messages": "{{ messages.append(1) }}",
}
NOTHING_SHOWN = {
    "an attribute by a filter": "{{ ''|attr('__class__') }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}{{ raise_exception.__code__ }}",
    "a format that looks inside": "{{ '{0.__class__}'.format(1) }}",
}
BROKEN = {
    "no end": "{% for m in messages %}",
    "no expression": "{{",
    "an unknown tag": "{% nothing %}",
    "an unknown filter": "{{ messages | nothing }}",
    "too deep an expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a number of too many digits": "{{ " + "9" * 10_000 + " }}",
    "too many blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "an undefined value": "{{ nothing.at.all }}",
    "its own error": "{{ raise_exception('no') }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a wrong type": "{{ 1 + 'a' }}{{ messages + 1 }}",
    "NULs": "\0{{ '\0' }}{% \0 %}",
}


@pytest.mark.parametrize("template", [*TOO_MUCH, *NOT_ALLOWED, *BROKEN])
def test_a_hostile_template_is_refused_within_its_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS_MAX", 0.5)
    source = {**TOO_MUCH, **NOT_ALLOWED, **BROKEN}[template]
    for chat in (
        {"messages": [HI], "chat_template": source},
        {"messages": [HI], "chat_template_kwargs": {"chat_template": source}},
    ):
        answer = check("/v1/score", {"model": MODEL, "chat": chat})
        assert (answer.status_code, answer.json()["error"]["reason"]) == (422, "bad_template")


SCRAPS = [
    *("{{ ", " }}", "{% ", " %}", "{# ", " #}", "{%- ", " -%}", "for m in messages", "endfor", "if ", "else", "endif", "x"),
    *("messages", "m.content", "m['role']", "| tojson", "| length", "~ 'a'", "+ 1", "* 2", "== none", "set x = ", "f(x)"),
    *("macro f(x)", "endmacro", "loop.index", "namespace(a=1)", "raise_exception('x')", "'", '"', "[0]", "(", ")", "\n"),
    *(".__class__", "strftime_now('%Y')", "generation", "endgeneration", "break", "recursive", "é🙂", "\0"),
]


@pytest.mark.parametrize("template", NOTHING_SHOWN)
def test_what_templates_must_not_see_is_not_there_for_them(template: str) -> None:
    chat = {"messages": [HI], "chat_template": "a" + NOTHING_SHOWN[template]}
    assert check("/v1/score", {"model": MODEL, "chat": chat}).json()["tokens"]["count"] == 1


@given(
    source=st.lists(st.sampled_from(SCRAPS), max_size=14).map(" ".join) | st.text(max_size=60),
    continued=st.booleans(),
)
@settings(max_examples=EXAMPLES * 2, deadline=None)
def test_any_template_is_rendered_or_refused(source: str, continued: bool) -> None:
    chat = {"messages": [HI, LAST], "chat_template": source}
    chat |= {"continue_final_message": continued, "add_generation_prompt": not continued}
    check("/v1/score", {"model": MODEL, "chat": chat})


# -- the backend by itself ---------------------------------------------------------------------------------------------------

truncations = st.none() | st.builds(
    Truncation,
    st.integers(-3, 60) | st.integers() | st.sampled_from([2**63, -(2**63), True, 1.5, "1", None]),  # type: ignore[arg-type]
    st.sampled_from([None, "left", "right", "middle", 7]),  # type: ignore[arg-type]
)


def tokenized(prompt: TextPrompt | ChatPrompt) -> None:
    """Check that a prompt has tokens, or is refused for a reason that lies in it."""
    for ask in (backend().tokenize, backend().known):
        found: Tokenized | TokenizationError
        try:
            found = ask(prompt)
        except TokenizationError as error:
            found = error
        if isinstance(found, Tokenized):
            assert all(0 <= token < 4096 for token in found.token_ids)
        else:
            assert found.field
            assert found.problem
            assert found.remedy
            assert not found.reason.transient


@given(text=texts | values, truncation=truncations, specials=st.booleans(), output=st.integers(0, 5000) | st.integers(0))
@settings(max_examples=EXAMPLES * 2, deadline=None)
def test_the_backend_takes_or_refuses_any_text(text: Any, truncation: Truncation | None, specials: bool, output: int) -> None:
    tokenized(TextPrompt(model=MODEL, text=text, truncation=truncation, add_special_tokens=specials, max_output_tokens=output))


@given(chat=bodies(("chat",)), truncation=truncations)
@settings(max_examples=EXAMPLES * 2, deadline=None)
def test_the_backend_takes_or_refuses_any_chat(chat: tuple[str, dict[str, Any]], truncation: Truncation | None) -> None:
    given_chat = chat[1].get("chat")
    if not isinstance(given_chat, dict):
        return
    fields = {name for name in ChatPrompt.__struct_fields__ if name not in ("model", "truncation", "max_output_tokens")}
    fields &= set(given_chat)
    tokenized(
        ChatPrompt(
            model=MODEL,
            truncation=truncation,
            **{"messages": [HI], **{name: given_chat[name] for name in fields}},
        )
    )
