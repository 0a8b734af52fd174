"""A chat becomes what vLLM 0.32 shows its template; ``tests/golden/test_tokens_corpus.py`` compares with a real one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.chat import conversation, with_developers_as_system
from kvatlas.tokens.local.chat_arguments import arguments
from kvatlas.tokens.local.templates import compiled
from kvatlas.tokens.prompts import ChatPrompt
from tests.models.chats import TEMPLATES

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}


def _seen(message: Any, content_format: Any = "string") -> dict[str, Any]:
    (seen,) = conversation([message], content_format)
    return seen


def _arguments(**kwargs: Any) -> dict[str, Any]:
    return arguments(ChatPrompt(model="m", messages=[USER], **kwargs))


def _refused(run: Any, *args: Any, **kwargs: Any) -> tuple[TokenizationReason, str]:
    with pytest.raises(TokenizationError) as caught:
        run(*args, **kwargs)
    return caught.value.reason, caught.value.field


@pytest.mark.parametrize(
    ("content", "text", "parts"),
    [
        ("hi", "hi", [{"type": "text", "text": "hi"}]),
        ("", "", [{"type": "text", "text": ""}]),
        ([], "", []),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, "b"],
            "a\nb",
            [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}],
        ),
        (
            [{"text": "a", "cache_control": {"x": 1}, "type": "text"}],
            "a",
            [{"type": "text", "text": "a", "cache_control": {"x": 1}}],
        ),
        ([{"type": "refusal", "refusal": "no"}], "no", [{"type": "text", "text": "no"}]),
        ([{"type": "thinking", "thinking": "hm", "closed": True}], "hm", [{"type": "text", "text": "hm"}]),
        ([{"type": "tool_reference", "name": "f"}], "f", [{"type": "tool_reference", "name": "f"}]),
    ],
)
def test_content_is_a_text_or_parts_as_the_template_wants_it(content: Any, text: str, parts: list[Any]) -> None:
    assert _seen({"role": "user", "content": content})["content"] == text
    assert _seen({"role": "user", "content": content}, "openai")["content"] == parts


def test_a_tools_answer_is_a_text_even_where_the_template_wants_parts() -> None:
    answer = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert _seen(answer, "openai") == {"role": "tool", "tool_call_id": "c", "content": "a\nb"}
    answer["content"] = [{"type": "tool_reference", "name": "f"}]
    assert _seen(answer, "openai")["content"] == [{"type": "tool_reference", "name": "f"}]


@pytest.mark.parametrize(
    ("given", "seen"),
    [('{"a": 1}', {"a": 1}), ("", {}), ("[1]", {}), ("no json", {}), ('"text"', {}), ('{"ü": [1, null]}', {"ü": [1, None]})],
)
def test_arguments_of_tool_calls_are_objects(given: str, seen: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": given}}]}
    before = copy.deepcopy(message)
    call = _seen(message)["tool_calls"][0]
    assert call["function"] == {"arguments": seen, "name": "f"}
    assert list(call) == ["id", "function", "type"]
    assert message == before


def test_no_tool_calls_are_left_out() -> None:
    assert "tool_calls" not in _seen({"role": "assistant", "content": "x", "tool_calls": []})
    assert "tool_calls" not in _seen({"role": "assistant", "content": "x", "tool_calls": None})


def test_reasoning_has_both_of_its_names() -> None:
    for given in ({"reasoning": "r"}, {"reasoning_content": "r"}, {"reasoning": "r", "reasoning_content": "other"}):
        seen = _seen({"role": "assistant", "content": "x", **given})
        assert (seen["reasoning"], seen["reasoning_content"]) == ("r", "r")
    assert "reasoning" not in _seen({"role": "user", "content": "x", "reasoning": "r"})


def test_only_what_the_engine_knows_gets_through() -> None:
    message = {"role": "user", "content": "x", "name": "ann", "other": 1, "tool_call_id": "c", "tool_calls": [CALL]}
    assert _seen(message) == {"role": "user", "content": "x", "name": "ann"}


def test_a_line_that_differs_in_each_request_leaves_system_messages() -> None:
    text = "x-anthropic-billing-header: cch=1\nrest"
    assert _seen({"role": "system", "content": text})["content"] == "rest"
    assert _seen({"role": "system", "content": [{"type": "text", "text": text.partition("\n")[0]}]}, "openai")["content"] == []
    assert _seen({"role": "user", "content": text})["content"] == text


def test_developers_become_the_system_where_the_template_knows_none() -> None:
    messages = conversation(
        [USER, {"role": "developer", "content": "d", "tools": [TOOL]}, {"role": "system", "content": "s"}], "string"
    )
    assert with_developers_as_system(messages) == [{"role": "system", "content": "d\n\ns"}, USER]
    first = conversation([{"role": "developer", "content": "d"}, USER], "string")
    assert with_developers_as_system(first) == [{"role": "system", "content": "d"}, USER]
    parts = conversation([USER, {"role": "developer", "content": "d"}], "openai")
    assert with_developers_as_system(parts)[0] == {"role": "system", "content": "d"}
    without = conversation([USER, {"role": "system", "content": "s"}], "string")
    assert with_developers_as_system(without) is without


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("text", "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": 5}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": {"type": "text"}}, "messages[0].content"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, 5]}, "messages[0].content[1]"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "file"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "uuid": "u"}]}, "messages[0].content[0].uuid"),
        ({"role": "user", "content": "x", "name": 5}, "messages[0].name"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL, 5]}, "messages[0].tool_calls[1]"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": None}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": None}]}, "messages[0].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[" * 9999}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[0].tool_call_id"),
    ],
)
def test_what_the_engine_refuses_is_named(message: Any, field: str) -> None:
    assert _refused(conversation, [message], "string") == (TokenizationReason.BAD_MESSAGES, field)


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, None, 5])
def test_messages_are_a_list_with_something_in_it(messages: Any) -> None:
    assert _refused(conversation, messages, "string") == (TokenizationReason.BAD_MESSAGES, "messages")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://x"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://x"}},
        {"type": "prompt_embeds", "data": ""},
        {"image_url": "http://x"},
        {"type": "image_url", "image_url": None, "uuid": "u"},
    ],
)
def test_media_need_a_renderer(part: Any) -> None:
    with pytest.raises(TokenizationError) as caught:
        conversation([USER, {"role": "user", "content": [{"type": "text", "text": "see"}, part]}], "openai")
    assert (caught.value.reason, caught.value.field) == (TokenizationReason.UNSUPPORTED, "messages[1].content[1]")
    assert "renderer" in caught.value.remedy


# --- what templates are given besides messages


def test_tools_have_the_keys_that_the_engine_knows_in_its_order() -> None:
    tool = {"extra": 1, "function": {"parameters": {"b": 1, "a": 2}, "name": "f", "other": 1, "strict": True}}
    (seen,) = _arguments(tools=[tool])["tools"]
    assert seen == {
        "type": "function",
        "function": {"name": "f", "description": None, "parameters": {"b": 1, "a": 2}, "strict": True},
    }
    assert list(seen) == ["type", "function"]
    assert list(seen["function"]) == ["name", "description", "parameters", "strict"]
    (deferred,) = _arguments(tools=[{**TOOL, "defer_loading": True}])["tools"]
    assert deferred["defer_loading"] is deferred["function"]["defer_loading"] is True


def test_tool_choice_none_leaves_tools_in_sight() -> None:
    assert _arguments(tools=[TOOL], tool_choice="none")["tools"]


def test_the_requests_fields_come_before_chat_template_kwargs() -> None:
    given = _arguments(
        reasoning_effort="low",
        documents=[{"text": "d"}],
        chat_template_kwargs={"add_generation_prompt": False, "reasoning_effort": "high", "documents": [], "own": 1},
    )
    assert given["add_generation_prompt"] is True
    assert (given["reasoning_effort"], given["documents"], given["own"]) == ("low", [{"text": "d"}], 1)


def test_tools_in_chat_template_kwargs_replace_the_requests() -> None:
    assert _arguments(tools=[TOOL], chat_template_kwargs={"tools": [{"x": 1}]})["tools"] == [{"x": 1}]
    assert _arguments(tools=[TOOL], chat_template_kwargs={"tools": None})["tools"][0]["function"]["name"] == "f"


def test_none_and_auto_are_as_good_as_not_given() -> None:
    given = _arguments(chat_template_kwargs={"a": None, "b": "auto", "c": False})
    assert ("a" in given, "b" in given, given["c"]) == (False, False, False)


@pytest.mark.parametrize(
    ("effort", "kwargs", "thinking"), [("low", {}, True), ("none", {}, False), ("low", {"enable_thinking": False}, False)]
)
def test_reasoning_effort_turns_thinking_on_unless_it_is_set(effort: str, kwargs: Any, thinking: bool) -> None:
    assert _arguments(reasoning_effort=effort, chat_template_kwargs=kwargs)["enable_thinking"] is thinking


def test_what_apply_chat_template_takes_for_itself_is_not_seen() -> None:
    given = _arguments(chat_template_kwargs={"truncation": True, "max_length": 3, "padding": True, "tokenize": False})
    assert set(given) == {"tools", "documents", "add_generation_prompt", "continue_final_message"}


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": []}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "other", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools[1].function"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "other"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {}}}, "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"documents": "x"}, "documents"),
        ({"documents": ["x"]}, "documents[0]"),
        ({"documents": [{"text": 5}]}, "documents[0].text"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": 5}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"documents": ["x"]}}, "chat_template_kwargs.documents"),
    ],
)
def test_requests_that_the_engine_refuses_are_named(kwargs: Any, field: str) -> None:
    assert _refused(_arguments, **kwargs) == (TokenizationReason.BAD_MESSAGES, field)


# --- content formats


@pytest.mark.parametrize(
    ("template", "content_format"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% for c in m['content'] | list %}{{ c }}{% endfor %}{% endfor %}", "openai"),
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set content = m.content %}{% for c in content %}{{ c }}{% endfor %}{% endfor %}", "openai"),
        (
            "{% macro f(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ f(m.content) }}{% endfor %}",
            "openai",
        ),
        (
            "{% macro f(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ f(x=m.content) }}{% endfor %}",
            "openai",
        ),
        ("{% macro f(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}{{ f(tools) }}", "string"),
        ("{% for t in tools %}{% for c in t.content %}{{ c }}{% endfor %}{% endfor %}", "string"),
        ("{% for a, b in messages %}{{ a }}{% endfor %}{% for c in content %}{{ c }}{% endfor %}", "string"),
    ],
)
def test_the_templates_loops_tell_its_content_format(template: str, content_format: str) -> None:
    assert compiled(template).content_format == content_format


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_only_one_template_of_the_corpus_takes_parts(file: Path) -> None:
    assert compiled(file.read_text()).content_format == ("openai" if file.stem == "parts" else "string")


# --- continue_final_message


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "go on ", "[go on "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", "  go on  ", "[go on"),
        (
            "{% for m in messages %}[{% for c in m.content %}{{ c.text }}{% endfor %}]{% endfor %}",
            [{"type": "text", "text": "a"}],
            "[a",
        ),
    ],
)
def test_the_text_ends_where_the_last_message_goes_on(template: str, content: Any, text: str) -> None:
    messages = [{"role": "assistant", "content": content}]
    before = copy.deepcopy(messages)
    assert compiled(template).render(messages, {}, continue_final_message=True) == text
    assert messages == before


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[0].content | upper }}"])
def test_a_message_that_the_template_does_not_show_can_not_go_on(template: str) -> None:
    messages = [{"role": "assistant", "content": "go on"}]
    refusal = _refused(compiled(template).render, messages, {}, continue_final_message=True)
    assert refusal == (TokenizationReason.BAD_MESSAGES, "continue_final_message")
