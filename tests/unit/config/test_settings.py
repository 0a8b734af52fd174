"""Settings: layers, forms and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas.config import Config, EngineSettings, ZmqSettings, describe_config, load_config
from kvatlas.config.layers import env_name
from kvatlas.errors import ConfigError


def load(text: str = "", *, environ: dict[str, str] | None = None, overrides: tuple[str, ...] = (), at: Path) -> Config:
    file = at / "kvatlas.yaml"
    file.write_text(text)
    return load_config(file, environ or {}, overrides)


def refusal(*overrides: str, environ: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(None, environ or {}, overrides)
    return caught.value


def test_without_any_input_the_defaults_hold() -> None:
    config = load_config(environ={})
    assert config == Config()
    assert config.api.host == "127.0.0.1"
    assert (config.index.ttl, config.index.max_size, config.index.max_bytes) == (3600.0, 1_000_000, 2 << 30)
    assert config.tiered_cache.weights == {"gpu": 1.0, "cpu": 0.8, "disk": 0.6, "storage": 0.5}
    assert config.zmq.bind is True


def test_every_default_passes_its_own_check() -> None:
    for setting in describe_config():
        if "[]" in setting.path or setting.default in ("none", "required"):
            continue
        text = setting.default.strip('"')
        load_config(environ={}, overrides=[f"{setting.path}={text}"])


def test_overrides_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    text = "index: {maxSize: 10, ttl: 10m, orphansMax: 10}"
    environ = {"KVATLAS_INDEX_MAX_SIZE": "20", "KVATLAS_INDEX_TTL": "20m"}
    config = load(text, environ=environ, overrides=("index.maxSize=30",), at=tmp_path)
    assert (config.index.max_size, config.index.ttl, config.index.orphans_max) == (30, 1200.0, 10)
    assert config.index.retired_hashes_max == 65_536


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h", 3600), ("90s", 90), ("250ms", 0.25), ("1h30m", 5400), ("1.5s", 1.5), ("2", 2), ("0.5", 0.5), ("1d", 86400)],
)
def test_durations_are_read_in_every_form(text: str, seconds: float) -> None:
    assert load_config(environ={}, overrides=[f"index.ttl={text}"]).index.ttl == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["1x", "h", "-1s", "1 h", "1h-30m", "nan", "inf", "true", "", "1e3", "٣s"])
def test_what_is_no_duration_is_refused_with_the_forms(text: str) -> None:
    error = refusal(f"index.ttl={text}")
    assert error.path == "index.ttl"
    assert "250ms" in error.allowed


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5MiB", 3 << 19), ("2000000", 2_000_000), ("3MB", 3_000_000)],
)
def test_sizes_are_read_in_every_form(text: str, size: int) -> None:
    assert load_config(environ={}, overrides=[f"index.maxBytes={text}"]).index.max_bytes == size


def test_numbers_in_a_file_are_durations_and_sizes_too(tmp_path: Path) -> None:
    config = load("index: {ttl: 5, maxBytes: 2097152}\ningest: {auditInterval: 0}", at=tmp_path)
    assert (config.index.ttl, config.index.max_bytes, config.ingest.audit_interval) == (5.0, 2 << 20, 0.0)


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("index.maxSiz=1", "index.maxSiz", "index.maxSize"),
        ("index.max_size=1", "index.max_size", "index.maxSize"),
        ("indx.ttl=1", "indx", "index"),
        ("zmq.engines=[{endpoint: 'tcp://a:1', dpRank: 2}]", "zmq.engines[0].dpRank", "zmq.engines[0].dpRanks"),
    ],
)
def test_an_unknown_setting_is_refused_with_its_path_and_what_was_probably_meant(
    override: str, path: str, suggestion: str
) -> None:
    error = refusal(override)
    assert error.path == path
    assert f'did you mean "{suggestion}"' in error.problem


@pytest.mark.parametrize(
    ("override", "path", "allowed"),
    [
        ("index.maxSize=0", "index.maxSize", "at least 1"),
        ("index.maxSize=1.5", "index.maxSize", "integer"),
        ("index.maxSize=yes", "index.maxSize", "integer"),
        ("api.port=65536", "api.port", "at most 65535"),
        ("ingest.staleEntries=dorp", "ingest.staleEntries", "downweight, drop, keep"),
        ("tieredCache.weights.gpu=1.5", "tieredCache.weights.gpu", "at most 1"),
        ("tieredCache.weights.gpu=.nan", "tieredCache.weights.gpu", "number"),
        ("tieredCache.weights.GPU=1", "tieredCache.weights.GPU", "gpu"),
        ("tieredCache.weights=3", "tieredCache.weights", "mapping"),
        ("zmq.engines=x", "zmq.engines", "list"),
        ("zmq.engines=[{pod: a}]", "zmq.engines[0].endpoint", "tcp://"),
        ("zmq.engines=[{endpoint: 'http://a:1'}]", "zmq.engines[0].endpoint", "tcp://"),
        ("zmq.engines=[{endpoint: 'tcp://a:65535', dpRanks: 2}]", "zmq.engines[0].endpoint", "65535"),
        ("zmq.replayEndpoint=tcp://{hots}:5558", "zmq.replayEndpoint", "{host}"),
        ("zmq.replayEndpoint=tcp://{host.__class__}:5558", "zmq.replayEndpoint", "{host}"),
        ("zmq.reconnectMin=20s", "zmq.reconnectMin", "at most"),
        ("api.tlsCertFile=/nowhere/cert.pem", "api.tlsCertFile", "readable"),
        ("api.tokenFile=/nowhere/token", "api.tokenFile", "readable"),
        ("api=1", "api", "api.NAME=VALUE"),
        ("api.port.low=1", "api.port.low", "api.port=VALUE"),
        ("index.maxSize", "index.maxSize", "path=value"),
        ("=1", "", "index"),
    ],
)
def test_a_bad_value_is_refused_with_its_path_and_what_is_allowed(override: str, path: str, allowed: str) -> None:
    error = refusal(override)
    assert error.path == path
    assert allowed in error.allowed
    assert str(error).startswith(path)


def test_a_variables_name_follows_from_the_path() -> None:
    assert env_name("index.maxSize") == "KVATLAS_INDEX_MAX_SIZE"
    assert env_name("api.port") == "KVATLAS_API_PORT"
    assert env_name("tieredCache.unknownWeight") == "KVATLAS_TIERED_CACHE_UNKNOWN_WEIGHT"
    names = [env_name(setting.path) for setting in describe_config() if "[]" not in setting.path]
    assert len(set(names)) == len(names)


def test_a_bad_variable_is_refused_with_setting_and_variable() -> None:
    error = refusal(environ={"KVATLAS_INDEX_MAX_SIZE": "many"})
    assert error.path == "index.maxSize"
    assert "KVATLAS_INDEX_MAX_SIZE" in error.problem


@pytest.mark.parametrize("name", ["KVATLAS_INDX_MAX_SIZE", "KVATLAS_INDEX_MAXSIZE", "KVATLAS_API_PROT"])
def test_a_misspelt_variable_is_refused_rather_than_ignored(name: str) -> None:
    assert refusal(environ={name: "1"}).path == name


def test_variables_that_kubernetes_sets_for_services_are_not_taken_for_settings() -> None:
    environ = {
        "KVATLAS_API_PORT": "tcp://10.96.0.12:8080",
        "KVATLAS_API_PORT_8080_TCP": "tcp://10.96.0.12:8080",
        "KVATLAS_API_PORT_8080_TCP_ADDR": "10.96.0.12",
        "KVATLAS_API_SERVICE_HOST": "10.96.0.12",
        "KVATLAS_API_SERVICE_PORT_HTTP": "8080",
    }
    assert load_config(environ=environ) == Config()


def test_lists_and_mappings_can_come_from_the_environment() -> None:
    environ = {
        "KVATLAS_ZMQ_ENGINES": "[{endpoint: 'tcp://10.0.0.7:5557', dpRanks: 2, pod: a}]",
        "KVATLAS_MODELS": "{llama: meta-llama/Llama-3.1-8B-Instruct}",
        "KVATLAS_KEYS_SEED": "42",
    }
    config = load_config(environ=environ)
    assert config.zmq.engines == (EngineSettings(endpoint="tcp://10.0.0.7:5557", dp_ranks=2, pod="a"),)
    assert config.models == {"llama": "meta-llama/Llama-3.1-8B-Instruct"}
    assert config.keys.seed == "42"


def test_weights_are_merged_over_the_defaults() -> None:
    config = load_config(environ={}, overrides=["tieredCache.weights={cpu: 0.7, hbm: 0.9}"])
    assert config.tiered_cache.weights == {"gpu": 1.0, "cpu": 0.7, "disk": 0.6, "storage": 0.5, "hbm": 0.9}


def test_the_central_address_is_bound_unless_engines_are_listed() -> None:
    engines = "zmq.engines=[{endpoint: 'tcp://a:1'}]"
    assert load_config(environ={}, overrides=[engines]).zmq.bind is False
    assert load_config(environ={}, overrides=[engines, "zmq.bind=true"]).zmq.bind is True
    assert ZmqSettings().bind is True


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    assert load("api:\nindex: {}\n", at=tmp_path) == Config()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("index: [", "YAML at line 1"),
        ("index: {ttl: 1h}\nindex: {ttl: 2h}", "doubled"),
        ("index: {ttl: 1h, ttl: 2h}", "doubled"),
        ("a: &a [x]\nb: [*a, *a]", "references"),
        ("- 1", "no settings"),
        ("? [a]\n: 1", "key must be text"),
        ("index: !!python/object/apply:os.system ['true']", "YAML"),
        ("[" * 5000, "YAML"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(text, at=tmp_path)


def test_a_file_that_is_missing_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml", {})
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"index: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        load_config(file, {})


def test_a_token_comes_from_a_file_and_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    written = "s3cret-token"
    file.write_text(f"{written}\n")
    config = load_config(environ={}, overrides=[f"api.tokenFile={file}"])
    assert config.api.token == written
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize("content", ["", "two words", "ümlaut", "x" * 5000])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, overrides=[f"api.tokenFile={file}"])
    assert caught.value.path == "api.tokenFile"
    assert not content or content not in str(caught.value)


def test_token_and_token_file_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a")
    assert refusal("api.token=b", f"api.tokenFile={file}").path == "api.tokenFile"


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("x")
    for section in ("api", "proxy", "extProc"):
        assert refusal(f"{section}.tlsCertFile={file}").path == f"{section}.tlsKeyFile"
        assert refusal(f"{section}.tlsKeyFile={file}").path == f"{section}.tlsCertFile"


def test_every_setting_is_documented_once_with_type_and_default() -> None:
    settings = describe_config()
    by_path = {setting.path: setting for setting in settings}
    assert len(by_path) == len(settings)
    assert all(setting.doc.endswith(".") for setting in settings)
    assert by_path["index.ttl"][1:3] == ("duration", "1h")
    assert by_path["index.maxBytes"][1:3] == ("size", "2GiB")
    assert by_path["zmq.engines[].endpoint"][1:3] == ("text", "required")
    assert by_path["ingest.staleEntries"].type == "one of downweight, drop, keep"
