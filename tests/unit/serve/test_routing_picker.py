"""What an EndpointPickerConfig says of endpoints, polls and tokens becomes settings of kvatlas, where those say nothing."""

from __future__ import annotations

import pytest

from kvatlas.config import Config, load_config
from kvatlas.errors import ConfigError
from kvatlas.route.picker_config import read_config
from kvatlas.serve.routing.picker import adopt

DISCOVERY = """
plugins: [{type: file-discovery, parameters: {path: fleet.yaml%s}}]
dataLayer: {discovery: {pluginRef: file-discovery}}
"""
POLLS = "{plugins: [{type: metrics-data-source, parameters: {interval: 100ms}}]}"
RENDERER = "{plugins: [{type: token-producer, parameters: {modelName: m, vllm: {url: 'http://render:8000'}}}]}"


def adopted(picker: str, *overrides: str) -> tuple[Config, list[str]]:
    return adopt(load_config(environ={}, overrides=overrides), read_config(picker))


def test_file_discovery_names_the_endpoints_file() -> None:
    config, notes = adopted(DISCOVERY % ", watchFile: true")
    assert (config.route.endpoints_file, config.route.watch_file) == ("fleet.yaml", True)
    assert adopted(DISCOVERY % "")[0].route.watch_file is False
    assert notes == []


@pytest.mark.parametrize(
    ("name", "value"), [("route.endpoints", '["http://10.0.0.1:8000"]'), ("route.endpointsFile", "own.yaml")]
)
def test_endpoints_of_kvatlas_own_settings_go_first(name: str, value: str) -> None:
    config, notes = adopted(DISCOVERY % "", f"{name}={value}")
    assert config.route == load_config(environ={}, overrides=[f"{name}={value}"]).route
    assert notes == [f"plugins[0].parameters.path has no effect: {name} goes first"]


def test_a_file_that_discovery_does_not_refer_to_is_not_read() -> None:
    config, _ = adopted("{plugins: [{type: file-discovery, parameters: {path: fleet.yaml}}]}")
    assert config.route.endpoints_file is None


def test_the_scrape_interval_is_the_poll_interval() -> None:
    assert adopted(POLLS)[0].route.polls.interval == 0.1
    config, (note,) = adopted(POLLS, "route.polls.interval=2s")
    assert config.route.polls.interval == 2
    assert "route.polls.interval goes first" in note


def test_a_token_producers_renderer_is_asked_for_tokens() -> None:
    config, notes = adopted(RENDERER)
    assert (config.tokens.renderer.endpoints, config.tokens.renderer.timeout) == (("http://render:8000",), 5)
    assert config.tokens.configured
    assert notes == []


def test_a_model_alone_asks_llmds_default_renderer_unless_that_is_the_proxy() -> None:
    named = "{plugins: [{type: token-producer, parameters: {modelName: m}}]}"
    assert adopted(named)[0].tokens.renderer.endpoints == ("http://localhost:8000",)
    config, (note,) = adopted(named, 'route.frontDoors=["proxy"]')
    assert not config.tokens.configured
    assert "is this proxy itself" in note


@pytest.mark.parametrize(
    ("service", "address"),
    [("{socketFile: /run/t.socket}", "unix:///run/t.socket"), ("{socketFile: 'tokens:50052', useTCP: true}", "tokens:50052")],
)
def test_a_token_producers_service_is_asked_for_tokens(service: str, address: str) -> None:
    config, _ = adopted(f"{{plugins: [{{type: token-producer, parameters: {{udsTokenizerConfig: {service}}}}}]}}")
    assert config.tokens.service.address == address


@pytest.mark.parametrize("own", ["tokens.models.m=/models/m", 'tokens.renderer.endpoints=["http://own:8000"]'])
def test_tokens_of_kvatlas_own_settings_go_first(own: str) -> None:
    config, (note,) = adopted(RENDERER, own)
    assert config.tokens == load_config(environ={}, overrides=[own]).tokens
    assert "the section tokens goes first" in note


def test_a_renderer_without_a_scheme_is_refused_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"plugins\[0\]\.parameters\.vllm\.url"):
        read_config(RENDERER.replace("http://", ""))


def test_parameters_that_nobody_reads_are_named_in_a_note() -> None:
    config = read_config("{plugins: [{type: metrics-data-source, parameters: {path: /m, scheme: https, interval: 1s}}]}")
    assert [note.partition(" has no effect: ")[0] for note in config.notes] == [
        "plugins[0].parameters.path",
        "plugins[0].parameters.scheme",
    ]
