"""Mistral's format, with tokenizers that come with mistral_common. vLLM's own answers: tests/live/mistral_against_vllm.py."""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.encoding import LocalTokenizer
from kvatlas.tokens.local.mistral import DEFAULT_MAX_MODEL_LEN, MistralTokenizer, load_mistral, mistral_file
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = "mistral_instruct_tokenizer_241114.model.v7"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}


def load(directory: Path, file: str = "tekken_240911.json", name: str = "tekken.json") -> MistralTokenizer:
    shutil.copy(DATA / file, directory / name)
    return load_mistral(directory, name="m", revision="r")


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    return load(tmp_path_factory.mktemp("tekken"))


def text_of(tokenizer: MistralTokenizer, *messages: dict[str, Any], **more: Any) -> str:
    """Return a chat's tokens as text, with special tokens."""
    tokens = tokenizer.tokenize(ChatPrompt(model="m", messages=messages, **more))
    return tokenizer._tokens.decode(tokens.tolist(), SpecialTokenPolicy.KEEP)


def refusal(tokenizer: MistralTokenizer, *messages: Any, **more: Any) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        tokenizer.tokenize(ChatPrompt(model="m", messages=messages, **more))
    return caught.value


def call(arguments: Any, call_id: str = "call_0123456789abc", **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}],
        **more,
    }


def result(content: Any, call_id: str = "call_0123456789abc") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# -- tokens -------------------------------------------------------------------------------------------------------------


def test_it_is_a_local_tokenizer_without_text(tekken: MistralTokenizer) -> None:
    local: LocalTokenizer = tekken
    assert (local.name, local.revision, local.text, local.max_model_len) == ("m", "r", None, None)
    assert local.chars_per_token_max == max(map(len, tekken._tokens.vocab()))
    with pytest.raises(TokenizationError, match="one step"):
        local.render(ChatPrompt(model="m", messages=[USER]))


def test_a_text_is_tokenized_with_or_without_bos(tekken: MistralTokenizer) -> None:
    without = tekken.tokenize(TextPrompt(model="m", text="Hello [INST] 日本", add_special_tokens=False))
    assert tekken.tokenize(TextPrompt(model="m", text="Hello [INST] 日本")).tolist() == [1, *without]
    assert without.typecode == "I"
    assert min(without) >= 1000  # what looks like a special token is text
    assert tekken.tokenize(TextPrompt(model="m", text="")).tolist() == [1]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "[INST]Hi[/INST]"),
        ([{"role": "system", "content": "S"}, USER, ANSWER, USER], "[INST]Hi[/INST]Hello</s>[INST]S\n\nHi[/INST]"),
        ([{"role": "developer", "content": "S"}, USER], "[INST]S\n\nHi[/INST]"),
        ([USER, USER], "[INST]Hi\n\nHi[/INST]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": t, "cache_control": {}} for t in "ab"]}],
            "[INST]a\n\nb[/INST]",
        ),
        ([{"role": "user", "content": "[INST] </s>"}], "[INST][INST] </s>[/INST]"),
        ([USER, {**ANSWER, "tool_calls": []}, USER], "[INST]Hi[/INST]Hello</s>[INST]Hi[/INST]"),
    ],
)
def test_chats_become_what_vllm_makes_of_them(tekken: MistralTokenizer, messages: list[dict[str, Any]], text: str) -> None:
    assert text_of(tekken, *messages) == f"<s>{text}"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a":1,"b":"é"}', '{"a": 1, "b": "é"}'),
        ('{"a":', "{}"),
        ("[1]", "{}"),
        ("", "{}"),
        ("null", "{}"),
        ("[" * 99999, "{}"),
    ],
)
def test_a_calls_arguments_are_an_object_and_its_id_its_last_characters(
    tekken: MistralTokenizer, arguments: str, shown: str
) -> None:
    text = text_of(tekken, USER, call(arguments), result("42"), tools=TOOLS)
    tool = json.dumps(TOOLS)
    made = f'[TOOL_CALLS][{{"name": "f", "arguments": {shown}, "id": "456789abc"}}]</s>'
    answered = '[TOOL_RESULTS]{"content": 42, "call_id": "456789abc"}[/TOOL_RESULTS]'
    assert text == f"<s>[AVAILABLE_TOOLS]{tool}[/AVAILABLE_TOOLS][INST]Hi[/INST]{made}{answered}"


def test_a_tools_missing_parts_are_filled_in(tekken: MistralTokenizer) -> None:
    text = text_of(tekken, USER, tools=[{"function": {"name": "f", "strict": None, "unknown": 1}}])
    assert '{"name": "f", "description": "", "parameters": {}}' in text


def test_the_last_answer_can_be_continued(tekken: MistralTokenizer) -> None:
    assert text_of(tekken, USER, ANSWER, **CONTINUED) == "<s>[INST]Hi[/INST]Hello"


def test_nothing_that_is_passed_in_is_changed(tekken: MistralTokenizer) -> None:
    messages = [USER, call('{"a":1}'), result([{"type": "text", "text": "x"}])]
    before = copy.deepcopy((messages, TOOLS))
    text_of(tekken, *messages, tools=TOOLS)
    assert (messages, TOOLS) == before


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    """Version 15: thinking, and a reasoning effort."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    content = json.loads((DATA / "tekken_240911.json").read_bytes())
    content["config"]["version"] = "v15"
    content["special_tokens"] = [
        {"rank": rank, "token_str": token.value, "is_control": True} for rank, token in enumerate(SpecialTokens)
    ]
    effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
    content["model_settings_builder"] = {"reasoning_effort": effort}
    directory = tmp_path_factory.mktemp("reasoning")
    (directory / "tekken.json").write_text(json.dumps(content))
    return load_mistral(directory, name="m", revision=None)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "x", "reasoning": "why"},
        {"content": "x", "reasoning_content": "why"},
        {"content": [{"type": "thinking", "thinking": "why", "closed": True}, {"type": "text", "text": "x"}]},
    ],
)
def test_reasoning_is_kept_as_thinking(reasoning: MistralTokenizer, answer: dict[str, Any]) -> None:
    assert "[THINK]why[/THINK]x" in text_of(reasoning, USER, {"role": "assistant", **answer}, USER)


def test_a_reasoning_effort_counts_from_version_15_on(reasoning: MistralTokenizer, tekken: MistralTokenizer) -> None:
    assert reasoning.version == 15
    assert text_of(reasoning, USER, reasoning_effort="high") != text_of(reasoning, USER, reasoning_effort="none")
    assert text_of(tekken, USER, reasoning_effort="high") == text_of(tekken, USER)
    assert refusal(reasoning, USER, reasoning_effort="low").reason is TokenizationReason.BAD_MESSAGES
    assert refusal(tekken, USER, reasoning_effort="very").field == "reasoning_effort"


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "more"),
    [
        ([], {}),
        ([USER, ANSWER], {}),
        ([USER, ANSWER], {"add_generation_prompt": False}),
        ([USER], CONTINUED),
        ([USER, ANSWER], {"continue_final_message": True}),
        ([USER], {"tools": []}),
        ([USER], {"tools": [{"type": "function"}]}),
        ([USER], {"tools": ["x"]}),
        ([USER], {"tools": [{"type": "other", "function": FUNCTION}]}),
        ([USER, ANSWER, {"role": "system", "content": "S"}, USER], {}),
        ([{"role": "other", "content": "x"}], {}),
        ([{"content": "x"}], {}),
        (["x"], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": None}], {}),
        ([{"role": "user", "content": 5}], {}),
        ([{"role": "user", "content": ["x"]}], {}),
        ([{"role": "user", "content": [{"type": "text"}]}], {}),
        ([USER, {"role": "assistant", "content": "x", "tool_calls": 5}, USER], {}),
        ([USER, call({"a": 1}), result("x")], {}),
        ([USER, call("{}", "short"), result("x", "short")], {}),
        ([USER, call("{}"), {"role": "tool", "content": "x"}], {}),
        ([USER, call("{}", content="text too"), result("x")], {}),
        ([USER, {"role": "assistant", "content": "x", "reasoning": "no thinking in version 3"}, USER], {}),
    ],
)
def test_chats_that_vllm_refuses_are_refused(tekken: MistralTokenizer, messages: list[Any], more: dict[str, Any]) -> None:
    assert refusal(tekken, *messages, **more).reason is TokenizationReason.BAD_MESSAGES


@pytest.mark.parametrize("given", [{"chat_template": "x"}, {"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {}}])
def test_templates_are_refused(tekken: MistralTokenizer, given: dict[str, Any]) -> None:
    assert refusal(tekken, USER, **given).reason is TokenizationReason.BAD_TEMPLATE


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "audio_url", "audio", "file", "refusal", "input_text"])
def test_what_is_not_text_is_never_fetched_or_decoded(
    tekken: MistralTokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    part = {"type": kind, kind: {"url": "http://127.0.0.1:9/x.png"}, "url": "http://127.0.0.1:9/x", "path": "/etc/passwd"}
    error = refusal(tekken, {"role": "user", "content": [part]})
    assert error.reason is TokenizationReason.UNSUPPORTED
    assert error.reason.of_backend


def test_a_refusal_has_nothing_of_the_chats_text(tekken: MistralTokenizer) -> None:
    named = {"name": "a SECRET", "arguments": "{}"}
    thinking = {"role": "assistant", "content": [{"type": "thinking", "thinking": "SECRET"}]}
    for messages in (
        [USER, {"role": "assistant", "content": "SECRET", "tool_calls": call("{}")["tool_calls"]}, result("SECRET")],
        [{"role": "user", "content": "SECRET"}, thinking, USER],
        [USER, {**call("{}"), "tool_calls": [{**call("{}")["tool_calls"][0], "function": named}]}, result("x")],
        [USER, call('{"a": "SECRET"}'), {"role": "tool", "content": "SECRET", "tool_call_id": ""}],
    ):
        assert "SECRET" not in str(refusal(tekken, *messages))


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["tokenizer.model.v3", "tekken.json"], "tekken.json"),
        (["tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1"], "tokenizer.model.v7m1"),
        (["tokenizer.model"], "tokenizer.model"),
        (["tokenizer.json", "model.safetensors", "tekken_240911.json", "model.v3"], None),
        ([], None),
    ],
)
def test_the_file_is_chosen_as_mistral_common_does(names: list[str], file: str | None) -> None:
    assert mistral_file(names) == file


def test_sentencepiece_models_work_too(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = load(tmp_path, SENTENCEPIECE, "tokenizer.model.v7")
    assert tokenizer.version == 7
    assert tokenizer.tokenize(TextPrompt(model="m", text="Hello"))[0] == 1
    assert len(tokenizer.tokenize(ChatPrompt(model="m", messages=[USER]))) > 3


def test_a_missing_sentencepiece_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("`sentencepiece` is not installed. Please install it")

    monkeypatch.setattr("mistral_common.tokens.tokenizers.sentencepiece.assert_sentencepiece_installed", missing)
    with pytest.raises(TokenizationError) as caught:
        load(tmp_path, SENTENCEPIECE, "tokenizer.model.v7")
    assert caught.value.reason is TokenizationReason.NOT_INSTALLED
    assert "sentencepiece" in caught.value.remedy


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"{", b'{"config": {"version": "v99"}}', b"\xff" * 100])
def test_a_broken_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tekken.json").write_bytes(content)
    with pytest.raises(TokenizationError) as caught:
        load_mistral(tmp_path, name="m", revision=None)
    assert caught.value.reason is TokenizationReason.BROKEN_TOKENIZER


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"params.json": {"max_position_embeddings": 5}, "config.json": {"max_position_embeddings": 7}}, 5),
        ({"params.json": {}, "config.json": {"max_position_embeddings": 7}}, 7),
        ({"config.json": {"text_config": {"max_position_embeddings": 9}}}, 9),
        ({"params.json": {}}, DEFAULT_MAX_MODEL_LEN),
        ({"config.json": {"max_position_embeddings": "many"}}, None),
        ({"config.json": []}, None),
    ],
)
def test_the_models_length_is_what_vllm_derives(tmp_path: Path, files: dict[str, Any], length: int | None) -> None:
    from kvatlas.tokens.local.mistral import _max_model_len

    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert _max_model_len(tmp_path) == length


def test_threads_get_the_same_tokens(tekken: MistralTokenizer) -> None:
    chats = [ChatPrompt(model="m", messages=[{"role": "user", "content": f"number {number}"}]) for number in range(50)]
    alone = [tekken.tokenize(chat) for chat in chats]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tekken.tokenize, chats * 4)) == alone * 4
