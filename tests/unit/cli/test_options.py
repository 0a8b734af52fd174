"""Options that several commands share, and how a service's failures are told."""

from __future__ import annotations

import httpx
import pytest

from kvatlas.cli.client import ServiceClient
from kvatlas.cli.options import duration, engines_override
from kvatlas.config import load_config
from kvatlas.config.quantities import Seconds
from kvatlas.errors import ConfigError, RequestError


def test_engine_options_become_settings() -> None:
    text = "tcp://10.0.0.7:5557,replay=tcp://10.0.0.7:5607,pod=a,model=llama,dp=2,decoder=sglang"
    first, second = load_config(environ={}, overrides=engines_override([text, "tcp://10.0.0.8:5557"])).zmq.engines
    assert (first.endpoint, first.replay_endpoint, first.pod) == ("tcp://10.0.0.7:5557", "tcp://10.0.0.7:5607", "a")
    assert (first.model, first.dp_ranks, first.decoder) == ("llama", 2, "sglang")
    assert (second.endpoint, second.replay_endpoint, second.dp_ranks) == ("tcp://10.0.0.8:5557", None, 1)


@pytest.mark.parametrize("text", ["tcp://a:1,", "tcp://a:1,replay", "tcp://a:1,pod=", "tcp://a:1,colour=red"])
def test_an_engine_option_with_an_unknown_part_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--engine"):
        engines_override([text])


@pytest.mark.parametrize("text", ["10.0.0.7:5557", "tcp://a", "tcp://a:1,dp=many", "tcp://a:1,replay=b"])
def test_an_engine_option_with_a_bad_value_is_refused_by_the_settings(text: str) -> None:
    with pytest.raises(ConfigError, match=r"zmq\.engines"):
        load_config(environ={}, overrides=engines_override([text]))


def test_durations_are_read_as_in_settings() -> None:
    assert duration("--duration", "1m30s") == Seconds(90)
    assert duration("--duration", None) is None
    for text in ("soon", "0s", "-1"):
        with pytest.raises(RequestError, match="--duration"):
            duration("--duration", text)


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (401, b'{"error":{"field":"authorization","problem":"x","remedy":"y"}}', "KVATLAS_API_TOKEN"),
        (422, b'{"error":{"field":"model","problem":"is empty","remedy":"name it"}}', "model: is empty; name it"),
        (502, b"<html>", "status 502"),
        (200, b"<html>", "none of kvatlas"),
        (200, b'{"pods": 5}', "none of kvatlas"),
    ],
)
def test_a_services_failures_say_what_to_do(status: int, content: bytes, told: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))
    with pytest.raises(RequestError, match=told):
        ServiceClient("http://kvatlas:8080", transport=transport).pods()


@pytest.mark.parametrize("url", ["kvatlas:8080", "ftp://kvatlas", "http://[", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(RequestError):
        ServiceClient(url).pods()


def test_the_token_is_sent_as_a_bearer_token() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, content=b'{"pods":[]}')

    ServiceClient("http://kvatlas:8080/", "secret", transport=httpx.MockTransport(answer)).pods()
    ServiceClient("http://kvatlas:8080/", transport=httpx.MockTransport(answer)).pods()
    assert seen == ["Bearer secret", None]
