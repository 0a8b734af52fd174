"""The HTTP API's documentation: one entry an operation, with examples, and the schemas of all bodies.

Written here rather than derived by the framework: bodies are read by msgspec (one pass, first error with its position, no
million error objects for a million bad tokens), whose schemas these are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from kvatlas.results import ScoreResult
from kvatlas.serve.dashboard.http import DashboardAnswer
from kvatlas.serve.routing.explain import DecisionsAnswer, EndpointsAnswer
from kvatlas.serve.schema import (
    CandidatesAnswer,
    CandidatesBody,
    ErrorAnswer,
    HealthAnswer,
    LlmdChatBody,
    LlmdCompletionBody,
    LocalityAnswer,
    LocalityBody,
    PodsAnswer,
    ScoreBody,
)

_BODIES = (
    ScoreBody,
    CandidatesBody,
    LocalityBody,
    LlmdCompletionBody,
    LlmdChatBody,
    ScoreResult,
    CandidatesAnswer,
    LocalityAnswer,
    PodsAnswer,
    DecisionsAnswer,
    EndpointsAnswer,
    DashboardAnswer,
    HealthAnswer,
    ErrorAnswer,
)
_REF = "#/components/schemas/{name}"

_PROMPT = {"model": "meta-llama/Llama-3.1-8B-Instruct", "token_ids": [128000, *range(9906, 9965)]}
_CHAT = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "chat": {
        "messages": [
            {"role": "system", "content": "You are a booking agent."},
            {"role": "user", "content": "I want to change my flight."},
        ]
    },
}
_OPENAI = {"model": _CHAT["model"], **_CHAT["chat"]}  # type: ignore[dict-item]
_COMPLETION = {"model": "meta-llama/Llama-3.1-8B-Instruct", "prompt": "Once upon a time"}
_TOKENS = {
    "source": "store",
    "tokenizer": "meta-llama/Llama-3.1-8B-Instruct",
    "revision": "0e9e39f249a16976918f6564b8830bc894c89659",
    "exact": True,
    "complete": True,
    "count": 60,
    "from_store": 48,
}
_POD = {
    "pod": "10.0.0.7:8000",
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "score": 2.8,
    "matched_blocks": 3,
    "matched_tokens": 48,
    "predicted_cached_tokens": 48,
    "tiers": {"gpu": 2, "cpu": 1},
    "dp_rank": 0,
    "predicted_by_rank": {"0": 48},
    "speculative_blocks": 0,
    "stale": False,
    "stale_reason": None,
}
_HOLDER = {
    "pod": "10.0.0.7:8000",
    "dp_rank": 0,
    "tier": "gpu",
    "group": 0,
    "copies": 1,
    "speculative": False,
    "stale": False,
}
_LOCATED = {"blocks": [{"key": "0x1f3a5c7e9b2d4f60", "holders": [_HOLDER]}], "block_size_tokens": 16}
_STREAM = {
    "pod": "10.0.0.7:8000",
    "dp_rank": 0,
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "state": "fresh",
    "stale_reason": None,
    "blocks": 18231,
    "orphans": 0,
    "block_sizes_tokens": [16],
    "groups": {"0": "full"},
    "next_seq": 90412,
    "queue_depth": 0,
    "gaps": 0,
    "replays": 0,
    "restarts": 0,
    "last_event_age_s": 0.021,
    "source": "tcp://10.0.0.7:5557",
}
_LOAD = {
    "in_flight_requests": 2,
    "in_flight_tokens": 9216,
    "in_flight_prefill_tokens": 512,
    "waiting": 0,
    "running": 3,
    "kv_usage": 0.41,
}
_ENDPOINT = {
    "endpoint": "default/llama-0",
    "address": "10.0.0.7:8000",
    "pod": "10.0.0.7:8000",
    "dp_rank": 0,
    "labels": {"llm-d.ai/role": "decode"},
    "health": "healthy",
    "load": _LOAD,
}
_DECISION = {
    "id": "6f1c0a52-4f0e-4b51-9d5e-1a0c8e0f5d11",
    "at_s": 1763800000.25,
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "prompt_tokens": 5000,
    "prompt_tokens_estimated": False,
    "endpoint": "default/llama-0",
    "address": "10.0.0.7:8000",
    "why": "default/llama-0 holds 4096 of 5000 tokens, as much as anybody (events)",
    "predicted_cached_tokens": 4096,
    "outcome": {"end": "done", "ttft_s": 0.061, "duration_s": 2.4, "prompt_tokens": 5000, "cached_tokens": 4096},
    "took_us": 85.2,
    "notes": [],
    "prefill": None,
    "encoders": [],
    "profiles": [
        {
            "profile": "default",
            "dropped": {},
            "candidates": [
                {
                    "endpoint": "default/llama-0",
                    "address": "10.0.0.7:8000",
                    "match": {"tokens": 4096, "matched_by": "events", "tiers": {"gpu": 4096}},
                    "load": _LOAD,
                    "scores": {
                        "expected-ttft-scorer": {
                            "score": 0.94,
                            "weight": 1.0,
                            "parts": {"ttft_s": 0.058, "queue_s": 0.012, "prefill_s": 0.046, "uncached_tokens": 904},
                        }
                    },
                    "total": 0.94,
                    "picked": True,
                }
            ],
        }
    ],
}
_FAULTS = {
    "400": ("The body is no JSON.", "body", "is no JSON: Input data was truncated", "send one JSON object in UTF-8"),
    "401": (
        "The bearer token is missing or wrong.",
        "authorization",
        "the bearer token is missing or wrong",
        "send the header Authorization: Bearer TOKEN",
    ),
    "408": (
        "The body did not arrive within api.requestTimeout.",
        "body",
        "was not received within api.requestTimeout (30 s)",
        "send it faster",
    ),
    "413": (
        "The body is larger than api.bodyBytesMax.",
        "body",
        "is larger than api.bodyBytesMax (16777216 bytes)",
        "send less in one request",
    ),
    "422": (
        "A field is unknown, missing or wrong; it is named.",
        "token_ids[3]",
        "expected `int` >= 0",
        "see /docs for the request's form",
    ),
    "501": (
        "Text or a chat was sent, and this service cannot tokenize it.",
        "text",
        "no tokenizer is configured",
        "name tokenizers (tokens.directories, tokens.models), a renderer (tokens.renderer) or a service (tokens.service)",
    ),
    "503": (
        "Too many queries are in progress, the service is stopping, or tokens cannot be had now; see Retry-After.",
        "service",
        "256 queries are in progress (api.concurrencyMax)",
        "retry after 1 s",
    ),
    "504": (
        "There was no answer within api.requestTimeout.",
        "service",
        "no answer within api.requestTimeout (30 s)",
        "ask for less, or again later",
    ),
}


def _content(kind: type[msgspec.Struct], example: Any) -> dict[str, Any]:
    schema = {"$ref": _REF.format(name=kind.__name__)}
    return {"application/json": {"schema": schema, "example": example}}


def _answers(kind: type[msgspec.Struct], example: Any, faults: tuple[str, ...], text: str = "The answer.") -> dict[str, Any]:
    answers = {status: _fault(status) for status in faults}
    return {"200": {"description": text, "content": _content(kind, example)}, **answers}


def _fault(status: str) -> dict[str, Any]:
    text, field, problem, remedy = _FAULTS[status]
    example = {"error": {"field": field, "problem": problem, "remedy": remedy}}
    return {"description": text, "content": _content(ErrorAnswer, example)}


def _query(body: type[msgspec.Struct], asked: Any, answer: type[msgspec.Struct], answered: Any) -> dict[str, Any]:
    return {
        "tags": ["queries"],
        "requestBody": {"required": True, "content": _content(body, asked)},
        "responses": _answers(answer, answered, tuple(_FAULTS)),
    }


def _llmd_query(body: type[msgspec.Struct], asked: Any) -> dict[str, Any]:
    text = "Scores by pod; pods that hold nothing are left out."
    faults = {status: _fault(status) for status in _FAULTS}
    schema = {"type": "object", "additionalProperties": {"type": "number"}}
    scores = {"application/json": {"schema": schema, "example": {"10.0.0.7:8000": 2.8}}}
    return {
        "tags": ["llm-d"],
        "requestBody": {"required": True, "content": _content(body, asked)},
        "responses": {
            "200": {"description": text, "content": scores},
            **faults,
        },
    }


def _parameter(name: str, text: str, example: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": text, "schema": {"type": "string"}, "example": example}


_LOCALITY_PARAMETERS = [
    _parameter("keys", "Block keys with commas between them; or else token_ids and model.", "0x1f3a5c7e9b2d4f60"),
    _parameter("token_ids", "The prompt's token ids with commas between them.", "128000,9906,1917"),
    _parameter("text", "The prompt as text.", "Hello"),
    _parameter("model", "The served model's name; needed with a prompt.", "meta-llama/Llama-3.1-8B-Instruct"),
    _parameter("lora_name", "The LoRA adapter's name.", "sql-adapter"),
    _parameter("cache_salt", "The request's cache_salt.", "tenant-7"),
    _parameter("pods", "Only these pods, with commas between them.", "10.0.0.7:8000"),
]

OPERATIONS: dict[str, dict[str, Any]] = {
    "score": _query(
        ScoreBody,
        _CHAT,
        ScoreResult,
        {
            "pods": [_POD],
            "scorer": "longest-prefix",
            "prompt_tokens": 60,
            "blocks": 3,
            "cache_hits": 3,
            "coverage": 1.0,
            "tokens": _TOKENS,
        },
    ),
    "score_completions": _llmd_query(LlmdCompletionBody, _COMPLETION),
    "score_chat_completions": _llmd_query(LlmdChatBody, _OPENAI),
    "candidates": _query(
        CandidatesBody,
        {"model": _PROMPT["model"], "text": "Once upon a time", "limit": 3},
        CandidatesAnswer,
        {"pods": [_POD], "tokens": _TOKENS},
    ),
    "locality": _query(LocalityBody, {"keys": ["0x1f3a5c7e9b2d4f60", "2250073426843488096"]}, LocalityAnswer, _LOCATED),
    "locality_by_url": {
        "summary": "Locality, by URL",
        "tags": ["queries"],
        "parameters": _LOCALITY_PARAMETERS,
        "responses": _answers(LocalityAnswer, _LOCATED, ("401", "422", "501", "503", "504")),
    },
    "pods": {
        "tags": ["operations"],
        "responses": _answers(PodsAnswer, {"pods": [_STREAM]}, ("401", "422", "503", "504")),
    },
    "decisions": {
        "tags": ["routing"],
        "parameters": [
            _parameter("id", "The decision for this request (x-request-id) only.", "6f1c0a52-..."),
            _parameter("endpoint", "Only requests sent to this endpoint: its name or ip:port.", "default/llama-0"),
            _parameter("limit", "At most this many.", "20"),
            _parameter("candidates", "At most this many candidates of each profile, the best ones.", "5"),
        ],
        "responses": _answers(DecisionsAnswer, {"decisions": [_DECISION]}, ("401", "422")),
    },
    "endpoints": {
        "tags": ["routing"],
        "responses": _answers(EndpointsAnswer, {"endpoints": [_ENDPOINT]}, ("401", "422")),
    },
    "preview": {
        "tags": ["routing"],
        "parameters": [_parameter("candidates", "At most this many candidates of each profile, the best ones.", "5")],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}, "example": _OPENAI}}},
        "responses": _answers(DecisionsAnswer, {"decisions": [_DECISION]}, ("400", "401", "413", "422")),
    },
    "dashboard": {
        "tags": ["operations"],
        "parameters": [
            _parameter("since", "The first step of the history that is wanted; steps are counted from 0.", "900"),
            _parameter("find", "Only engines whose name or model has this in it.", "llama-0"),
        ],
        "responses": _answers(DashboardAnswer, {}, ("401", "422"), "The fleet; the page's own data, which may change."),
    },
    "health": {"tags": ["operations"], "security": [], "responses": _answers(HealthAnswer, {"status": "ok"}, ())},
    "ready": {
        "tags": ["operations"],
        "security": [],
        "responses": {
            **_answers(HealthAnswer, {"status": "ready"}, ()),
            "503": {
                "description": "Answers cannot be relied on yet.",
                "content": _content(HealthAnswer, {"status": "not ready", "reason": "no event source is connected"}),
            },
        },
    },
    "metrics": {
        "tags": ["operations"],
        "responses": {
            "200": {
                "description": "The metrics.",
                "content": {"text/plain": {"schema": {"type": "string"}, "example": "kv_cache_blocks_total 18231.0\n"}},
            },
            "401": _fault("401"),
        },
    },
}
"""By operation: what its documentation says beyond summary and docstring."""


def install_components(app: FastAPI, *, token_needed: bool) -> None:
    """Let the app's OpenAPI document carry the schemas that the operations refer to. Built when first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_REF)
            components = made.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **schemas}
            if token_needed:
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"bearer": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
