"""Requests as routing reads them: whatever is JSON and names a model can be routed; what cannot be is refused by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import RequestError
from kvatlas.serve.routing.asked import Asked, read_request
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt

HELLO = [{"role": "user", "content": "hello"}]
NO_PRIORITIES: dict[str, int] = {}


def asked(path: str, body: object, **headers: str) -> Asked:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_request(path, names, raw, subset=None, priorities={"batch": -1, "chat": 5})


def refusal(body: object, **headers: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        asked("/v1/completions", body, **headers)
    return caught.value


def test_a_chat_is_to_be_tokenized_with_all_that_its_tokens_depend_on() -> None:
    found = asked("/v1/chat/completions", {"model": "m", "messages": HELLO, "add_generation_prompt": False, "n": 2})
    assert found.prompt == ChatPrompt(model="m", messages=HELLO, add_generation_prompt=False)
    assert found.request.text is not None
    assert "hello" in found.request.text
    assert found.request.prompt_tokens > 0


def test_a_completion_is_text_or_tokens() -> None:
    text = asked("/v1/completions", {"model": "m", "prompt": "hello", "stream": True, "cache_salt": "s", "max_tokens": 3})
    assert text.prompt == TextPrompt(model="m", text="hello", max_output_tokens=3)
    assert (text.stream, text.request.cache_salt) == (True, "s")
    tokens = asked("/v1/completions", {"model": "m", "prompt": [1, 2, 3]})
    assert (tokens.prompt, tokens.request.token_ids) == (None, tokens.request.token_ids)
    assert tokens.request.token_ids is not None
    assert (tokens.request.token_ids.tolist(), tokens.request.prompt_tokens) == ([1, 2, 3], 3)


@pytest.mark.parametrize(("prompts", "first"), [(["a b", "c"], "a b"), ([[7, 8], [9]], [7, 8])])
def test_of_several_prompts_the_first_is_looked_at(prompts: list[Any], first: object) -> None:
    found = asked("/v1/completions", {"model": "m", "prompt": prompts})
    if isinstance(first, str):
        assert isinstance(found.prompt, TextPrompt)
        assert found.prompt.text == first
    else:
        assert found.request.token_ids is not None
        assert found.request.token_ids.tolist() == first


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 5},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": "a", "truncate_prompt_tokens": "x"},
        {"prompt": None},
        {"stream": "maybe", "prompt": "a"},
        {},
    ],
)
def test_what_the_engine_would_refuse_is_routed_without_a_prompt(body: dict[str, Any]) -> None:
    found = asked("/v1/completions", {"model": "m", **body})
    assert (found.prompt, found.request.token_ids, found.request.model) == (None, None, "m")


def test_other_paths_are_routed_by_their_text_or_by_load() -> None:
    assert asked("/v1/embeddings", {"model": "m", "input": ["a", "b"]}).request.text == '["a", "b"]'
    assert asked("/v1/rerank", {"model": "m", "query": "a"}).request.text is None


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', {}, {"model": 5}, {"model": ""}, b"\xff", b"[" * 100_000])
def test_what_names_no_model_is_refused(body: object) -> None:
    error = refusal(body)
    assert error.field in ("body", "model")
    assert error.remedy


def test_headers_say_who_asks_and_how_urgent_it_is() -> None:
    found = asked(
        "/v1/completions",
        {"model": "m", "prompt": "a"},
        x_request_id="id-1",
        x_llm_d_inference_fairness_id="tenant",
        x_llm_d_inference_objective="batch",
        x_llm_d_slo_ttft_ms="250",
        prefer="if-available",
    ).request
    assert (found.id, found.fairness_id, found.priority) == ("id-1", "tenant", -1)
    assert (found.ttft_slo_s, found.tpot_slo_s, found.if_cached) == (0.25, None, True)
    assert asked("/v1/completions", {"model": "m"}, x_llm_d_inference_objective="nobody").request.priority == 0


def test_a_request_without_an_id_gets_one_of_its_own() -> None:
    ids = {asked("/v1/completions", {"model": "m"}).request.id for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf", "1e99"])
def test_a_time_that_is_none_is_refused_by_its_header(value: str) -> None:
    assert refusal({"model": "m"}, x_llm_d_slo_ttft_ms=value).field == "x-llm-d-slo-ttft-ms"


def test_a_rewrite_changes_the_model_and_nothing_else() -> None:
    body = b'{"model": "public", "prompt": "a", "x": 1e400, "n": 12345678901234567890123}'
    found = asked("/v1/completions", body, x_llm_d_model_name_rewrite="private")
    assert found.request.model == "private"
    assert json.loads(found.body.replace(b"1e400", b"1")) == json.loads(
        body.replace(b"public", b"private").replace(b"1e400", b"1")
    )
    assert asked("/v1/completions", body, x_llm_d_model_name_rewrite="public").body == body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]),
    body=st.dictionaries(
        st.sampled_from(["model", "prompt", "messages", "input", "stream", "cache_salt", "tools"]), json_values
    ),
)
def test_any_json_is_routed_or_refused(path: str, body: dict[str, Any]) -> None:
    if isinstance(body.get("model"), str) and body["model"]:
        assert asked(path, body).request.model == body["model"]
    else:
        assert refusal(body).field == "model"


@given(body=st.binary(max_size=100))
def test_bytes_that_are_no_request_are_refused(body: bytes) -> None:
    assert refusal(body).field in ("body", "model")
