"""What is sent to renderers, and how strictly their answers are read. Field names are those of vLLM 0.32."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.remote.calls import remote_text
from kvatlas.tokens.remote.render_messages import (
    Refusal,
    beyond_tokenize,
    read_refusal,
    read_rendered,
    read_tokenized,
    render_request,
    tokenize_request,
)
from kvatlas.types import MultimodalItem

TEXT = TextPrompt(model="m", text="hello")
HI = {"role": "user", "content": "hi"}
CHAT = ChatPrompt(model="m", messages=[HI])
TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(**fields: Any) -> ChatPrompt:
    return ChatPrompt(**{"model": "m", "messages": [HI], **fields})


def sent(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    path, body = render_request(prompt)
    return path, msgspec.json.decode(body)


# -- requests -----------------------------------------------------------------------------------------------------------


def test_a_text_is_sent_with_all_that_its_tokens_depend_on() -> None:
    assert sent(TextPrompt(model="m", text="hello", add_special_tokens=False, truncation=Truncation(7, "left"))) == (
        "/v1/completions/render",
        {
            "model": "m",
            "prompt": "hello",
            "add_special_tokens": False,
            "truncate_prompt_tokens": 7,
            "truncation_side": "left",
            "max_tokens": 1,
            "mm_payload": "none",
        },
    )


def test_a_chat_is_sent_with_all_that_its_tokens_depend_on() -> None:
    fields = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, IMAGE], "odd": 1}],
        "tools": [TOOL],
        "tool_choice": "required",
        "documents": [{"title": "t"}],
        "chat_template": "{{ x }}",
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "add_special_tokens": True,
        "reasoning_effort": "low",
    }
    path, body = sent(ChatPrompt(model="m", truncation=Truncation(-1), max_output_tokens=50, **fields))  # type: ignore[arg-type]
    assert path == "/v1/chat/completions/render"
    assert body == {"model": "m", **fields, "truncate_prompt_tokens": -1, "max_tokens": 1, "mm_payload": "none"}


def test_what_a_prompt_leaves_out_is_not_sent_so_that_the_servers_defaults_hold() -> None:
    assert set(sent(CHAT)[1]) == {
        "model",
        "messages",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "mm_payload",
    }
    assert msgspec.json.decode(tokenize_request(TEXT)[1]) == {"model": "m", "prompt": "hello", "add_special_tokens": True}


def test_any_mapping_and_sequence_is_sent() -> None:
    message = MappingProxyType({"role": "user", "content": ({"type": "text", "text": "x"},)})
    assert sent(chat(messages=(message,)))[1]["messages"] == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (TextPrompt(model="m", text="\ud800"), TokenizationReason.BAD_TEXT),
        (chat(messages=[{"role": "user", "content": "\udfff"}]), TokenizationReason.BAD_TEXT),
        (chat(messages=[{"role": "user", "content": object()}]), TokenizationReason.BAD_MESSAGES),
    ],
)
def test_what_is_no_json_is_refused_before_it_is_sent(prompt: Prompt, reason: TokenizationReason) -> None:
    with pytest.raises(TokenizationError) as caught:
        render_request(prompt)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TEXT, None),
        (CHAT, None),
        (chat(tools=[TOOL]), None),
        (chat(tools=[TOOL], tool_choice="auto"), None),
        (chat(tool_choice="none"), None),
        (chat(chat_template="x", chat_template_kwargs={"a": 1}, add_special_tokens=True), None),
        (chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]), None),
        (TextPrompt(model="m", text="x", truncation=Truncation(1)), "truncate_prompt_tokens"),
        (chat(truncation=Truncation(1)), "truncate_prompt_tokens"),
        (chat(documents=[]), "documents"),
        (chat(reasoning_effort="low"), "reasoning_effort"),
        (chat(tools=[]), "tools"),
        (chat(tools=[TOOL], tool_choice="none"), "tool_choice"),
        (chat(tools=[TOOL], tool_choice={"type": "function"}), "tool_choice"),
        (chat(tool_choice="auto"), "tool_choice"),
        (chat(model="openai/gpt-oss-20b"), "model"),
        (chat(messages=[HI, {"role": "assistant", "tool_calls": [{}]}]), "messages[1].tool_calls"),
        (chat(messages=[{"role": "tool", "tool_call_id": "1", "content": ""}]), "messages[0].tool_call_id"),
        (chat(messages=[{"role": "assistant", "reasoning_content": "x"}]), "messages[0].reasoning_content"),
        (chat(messages=[HI, {"role": "user", "content": [{"type": "text"}, IMAGE]}]), "messages[1].content[1]"),
    ],
)
def test_tokenize_is_used_only_where_it_gives_what_the_engine_uses(prompt: Prompt, field: str | None) -> None:
    assert beyond_tokenize(prompt) == field


# -- answers ------------------------------------------------------------------------------------------------------------


def rendered(**fields: object) -> bytes:
    return msgspec.json.encode({"request_id": "x", "token_ids": [1, 2, 3, 4, 5, 6, 7, 8], "features": None, **fields})


def features(hashes: object, places: object) -> bytes:
    return rendered(features={"mm_hashes": hashes, "mm_placeholders": places, "kwargs_data": None})


def test_token_ids_and_items_are_read_in_the_order_of_the_prompt() -> None:
    body = features(
        {"image": ["second", "first"], "audio": ["third"]},
        {"image": [{"offset": 3, "length": 2}, {"offset": 0, "length": 3}], "audio": [{"offset": 6, "length": 2}]},
    )
    found = read_rendered(CHAT, body)
    assert found.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found.token_ids.typecode == "I"
    assert found.multimodal == (MultimodalItem("first", 0, 3), MultimodalItem("second", 3, 2), MultimodalItem("third", 6, 2))
    assert read_rendered(CHAT, rendered(cache_salt="s", token_ids=[0xFFFF_FFFF])).token_ids.tolist() == [0xFFFF_FFFF]
    assert read_rendered(TEXT, b"[" + rendered() + b"]").multimodal == ()


# Two images (red, green) and a text, as `vllm launch render` 0.32 answered for a LLaVA with the tiny model's tokenizer, whose
# images are 16 tokens each; sampling_params left out.
OF_TWO_IMAGES = (
    b'{"request_id":"chatcmpl-8b12d6eb76b1c887","token_ids":[3,2356,203,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,'
    b"4096,4096,4096,4096,203,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,4096,203,92,4,203,3,3766,605,"
    b'897,203],"token_offsets":null,"features":{"mm_hashes":{"image":["24f52ab77931eabe14b27595e6867cbed8cbf866530aac4c0cacd637c65ef391",'
    b'"a77ec52d84bef97481fb8a6f13f55727c8b22e30dfe597a8f476a12b7b3494b9"]},"mm_placeholders":{"image":[{"offset":3,"length":16},'
    b'{"offset":20,"length":16}]},"kwargs_data":null,"mm_metadata":null},"content_parts":null,"model":"tinymm","reasoning_ended":null,'
    b'"reasoning_parser_kwargs":null,"return_token_ids":null,"output_mode":"tokens","stream":false,"stream_options":null,'
    b'"cache_salt":null,"priority":0,"kv_transfer_params":null,"ec_transfer_params":null}'
)


def test_vllms_own_answer_about_images_is_read() -> None:
    found = read_rendered(CHAT, OF_TWO_IMAGES)
    assert [(item.hash[:8], item.offset_tokens, item.length_tokens) for item in found.multimodal] == [
        ("24f52ab7", 3, 16),
        ("a77ec52d", 20, 16),
    ]
    for item in found.multimodal:
        assert item.length_tokens is not None
        places = found.token_ids[item.offset_tokens : item.offset_tokens + item.length_tokens]
        assert set(places) == {4096}, "the placeholder"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        rendered(token_ids=[]),
        rendered(token_ids=[1, -1]),
        rendered(token_ids=[1, 2**32]),
        rendered(token_ids=[1, 2.5]),
        rendered(token_ids=[True]),
        rendered(token_ids=["1"]),
        rendered(token_ids=None),
        rendered(features=[]),
        rendered(features={}),
        rendered(cache_salt=5),
        features({"image": ["a"]}, {}),
        features({"image": ["a"]}, {"video": [{"offset": 0, "length": 1}]}),
        features({"image": ["a", "b"]}, {"image": [{"offset": 0, "length": 1}]}),
        features({"image": [""]}, {"image": [{"offset": 0, "length": 1}]}),
        features({"image": ["x" * 5000]}, {"image": [{"offset": 0, "length": 1}]}),
        features({"image": [None]}, {"image": [{"offset": 0, "length": 1}]}),
        features({"image": ["a"]}, {"image": [{"offset": -1, "length": 1}]}),
        features({"image": ["a"]}, {"image": [{"offset": 0, "length": 0}]}),
        features({"image": ["a"]}, {"image": [{"offset": 7, "length": 2}]}),
        features({"image": ["a"]}, {"image": [{"offset": 2**70, "length": 1}]}),
        features(
            {"image": ["a"], "audio": ["b"]}, {"image": [{"offset": 0, "length": 3}], "audio": [{"offset": 2, "length": 1}]}
        ),
    ],
)
def test_an_answer_that_is_not_as_promised_is_none(body: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        read_rendered(CHAT, body)


@pytest.mark.parametrize("body", [rendered(), b"[]", b"[" + rendered() + b"," + rendered() + b"]"])
def test_one_prompt_has_one_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expected|array"):
        read_rendered(TEXT, body)


def test_tokenizes_answer_is_held_to_the_engines_own_bound() -> None:
    def answer(tokens: list[int], max_model_len: int = 4, **more: object) -> bytes:
        return msgspec.json.encode({"tokens": tokens, "count": len(tokens), "max_model_len": max_model_len, **more})

    assert read_tokenized(TEXT, answer([1, 2, 3])).token_ids.tolist() == [1, 2, 3]
    for prompt, tokens, reason in (
        (TEXT, [1, 2, 3, 4], TokenizationReason.TOO_MANY_TOKENS),
        (TEXT, [], TokenizationReason.REFUSED),
        (TextPrompt(model="m", text=""), [1], TokenizationReason.REFUSED),
    ):
        with pytest.raises(TokenizationError) as caught:
            read_tokenized(prompt, answer(tokens))
        assert caught.value.reason is reason
    with pytest.raises(ValueError, match="count is 9"):
        read_tokenized(TEXT, answer([1], count=9))


def test_refusals_name_the_field_where_they_do() -> None:
    body = b'{"error":{"message":"too big","type":"BadRequestError","param":"body.messages","code":400}}'
    assert read_refusal(body) == Refusal("too big", "BadRequestError", "messages")
    assert read_refusal(b'{"error":"Unauthorized"}') == Refusal("Unauthorized", "", None)
    for other in (b'{"detail":"Not Found"}', b"<html>", b"", b"\xff\xfe", b'{"error":{"message":5}}'):
        assert read_refusal(other) is None


def test_what_remotes_say_fits_into_a_line() -> None:
    assert remote_text("a\nb\x00\x1b[31mc\t d") == "a b [31mc d"
    assert len(remote_text("x" * 100_000)) < 600
