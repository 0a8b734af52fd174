"""An EndpointPickerConfig is read as llm-d reads it: what it comes to, what is refused and where."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.errors import ConfigError
from kvatlas.route.deciders import PrefixBasedPdDecider
from kvatlas.route.handlers import DisaggProfileHandler
from kvatlas.route.inert.data_layer import FileDiscovery, MetricsDataSource
from kvatlas.route.picker_config import (
    Catalog,
    PickerConfig,
    ProfilePlugin,
    ProfileSpec,
    build_router,
    load_config,
    read_config,
)
from kvatlas.route.picker_config.document import BYTES_MAX, Document
from kvatlas.route.plugins import plugin_types
from tests.unit.route.picker_configs import DISAGGREGATED, KSERVE, PRECISE

APPROX = "approx-prefix-cache-producer"
PRECISE_PRODUCER = "precise-prefix-cache-producer"


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        read_config(text)
    return raised.value


def types(config: PickerConfig) -> dict[str, str]:
    return {spec.name: spec.type for spec in config.plugins if spec.path}


def profile(name: str = "default", **weights: float) -> ProfileSpec:
    return ProfileSpec(name, tuple(ProfilePlugin(plugin.replace("_", "-"), weight) for plugin, weight in weights.items()))


def producer_of(config: PickerConfig, name: str = "prefix-cache-scorer") -> str:
    spec = config.plugin(name)
    assert spec is not None
    return spec.parameters.prefix_match_info_producer_name  # type: ignore[attr-defined,no-any-return]


# -- configurations in the wild --------------------------------------------------------------------------------------------


def test_the_precise_config() -> None:
    config = read_config(PRECISE)
    assert config.profiles == (
        profile(decode_filter=1, prefix_cache_scorer=2, kv_cache_utilization_scorer=1, queue_scorer=1, max_score_picker=1),
    )
    assert producer_of(config) == PRECISE_PRODUCER
    assert config.handler == "single-profile-handler"
    assert [source.plugin_ref for source in config.data_layer.sources] == [
        "metrics-data-source",
        "endpoint-notification-source",
    ]
    assert config.plugin(APPROX) is None
    assert config.notes == ()


def test_the_prefill_decode_config() -> None:
    config = read_config(DISAGGREGATED)
    assert config.profiles == (
        profile("prefill", prefill_filter=1, max_score_picker=1, prefix_cache_scorer=2, queue_scorer=1),
        profile("decode", decode_filter=1, max_score_picker=1, prefix_cache_scorer=2, queue_scorer=1),
    )
    assert config.handler == "disagg-profile-handler"
    assert producer_of(config) == producer_of(config, "prefix-based-pd-decider") == APPROX
    (decider,) = config.parameters_of(PrefixBasedPdDecider.Parameters)
    assert decider.non_cached_tokens == 16


def test_kserves_single_plugin_config_is_precise_matching() -> None:
    config = read_config(KSERVE)
    assert types(config) == {
        "single-profile-handler": "single-profile-handler",
        PRECISE_PRODUCER: PRECISE_PRODUCER,
        "prefix-cache-scorer": "prefix-cache-scorer",
        "load-aware-scorer": "load-aware-scorer",
        "max-score-picker": "max-score-picker",
    }
    assert producer_of(config) == PRECISE_PRODUCER
    assert config.profiles == (profile(prefix_cache_scorer=2, load_aware_scorer=1, max_score_picker=1),)
    assert "became the producer" in config.notes[0]


def test_no_config_at_all_is_llmds_default() -> None:
    config = read_config("")
    assert config.profiles == (
        profile(queue_scorer=2, kv_cache_utilization_scorer=2, prefix_cache_scorer=3, max_score_picker=1),
    )
    assert config.handler == "single-profile-handler"
    assert producer_of(config) == APPROX
    assert not config.flow_control_on
    assert config.flow_control.detector_plugin == "utilization-detector"


# -- defaults --------------------------------------------------------------------------------------------------------------


def test_without_profiles_all_filters_scorers_and_pickers_are_one() -> None:
    config = read_config("plugins: [{type: queue-scorer}, {type: decode-filter}, {type: single-profile-handler}]")
    assert config.profiles == (profile(queue_scorer=1, decode_filter=1, max_score_picker=1),)


def test_a_profile_without_picker_gets_the_one_that_is_configured() -> None:
    config = read_config(
        "{plugins: [{type: random-picker}, {type: queue-scorer}],"
        " schedulingProfiles: [{name: default, plugins: [{pluginRef: queue-scorer}]}]}"
    )
    assert config.profiles == (profile(queue_scorer=1, random_picker=1),)


def test_names_default_to_types_and_references_are_to_names() -> None:
    config = read_config(
        "{plugins: [{type: queue-scorer, name: q1}, {type: queue-scorer}],"
        " schedulingProfiles: [{name: p, plugins: [{pluginRef: q1, weight: 0.5}, {pluginRef: queue-scorer}]}]}"
    )
    assert types(config) == {"q1": "queue-scorer", "queue-scorer": "queue-scorer"}
    assert config.profiles == (profile("p", q1=0.5, queue_scorer=1, max_score_picker=1),)


def test_a_scorer_that_names_no_producer_goes_by_the_one_there_is() -> None:
    config = read_config(f"plugins: [{{type: {PRECISE_PRODUCER}, name: mine}}, {{type: prefix-cache-scorer}}]")
    assert producer_of(config) == "mine"
    assert config.plugin(APPROX) is None


def test_a_scorer_that_names_no_producer_goes_by_llmds_default_where_that_is_configured_too() -> None:
    config = read_config(f"plugins: [{{type: {PRECISE_PRODUCER}}}, {{type: {APPROX}}}, {{type: prefix-cache-scorer}}]")
    assert producer_of(config) == APPROX


def test_a_producer_that_does_not_match_caches_stands_in_for_none() -> None:
    assert producer_of(read_config("plugins: [{type: burst-prefix-cache-producer}, {type: prefix-cache-scorer}]")) == APPROX


def test_a_producer_that_is_named_must_be_one() -> None:
    plugins = "plugins: [{type: queue-scorer}, {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: %s}}]"
    path = "plugins[1].parameters.prefixMatchInfoProducerName"
    assert refused(plugins % "queue-scorer").path == refused(plugins % "nothing").path == path
    assert producer_of(read_config(plugins % APPROX)) == APPROX


def test_engines_metrics_are_read_unless_the_data_layer_says_otherwise() -> None:
    config = read_config("{plugins: [{type: metrics-data-source, parameters: {interval: 100ms, port: 9000}}]}")
    assert [source.plugin_ref for source in config.data_layer.sources] == ["metrics-data-source"]
    (source,) = config.parameters_of(MetricsDataSource.Parameters)
    assert (source.interval, source.port, source.scheme) == (0.1, 9000, "http")
    assert read_config("dataLayer: {injectDefaults: false}").data_layer.sources == ()


def test_discovery_from_a_file() -> None:
    config = read_config(
        "{plugins: [{type: file-discovery, parameters: {path: endpoints.yaml, watchFile: true}}],"
        " dataLayer: {discovery: {pluginRef: file-discovery}, crossReplicaSyncInterval: 1m30s}}"
    )
    assert config.data_layer.discovery is not None
    assert config.data_layer.discovery.plugin_ref == "file-discovery"
    assert config.data_layer.cross_replica_sync_interval == 90.0
    assert config.parameters_of(FileDiscovery.Parameters) == (FileDiscovery.Parameters("endpoints.yaml", watch_file=True),)


@pytest.mark.parametrize(
    ("gates", "is_on"),
    [
        ("[]", False),
        ("[flowControl]", True),
        ("[flowControl=TRUE]", True),
        ('["flowControl= f "]', False),
        ("[dataLayer]", False),
    ],
)
def test_feature_gates(gates: str, is_on: bool) -> None:
    assert read_config(f"featureGates: {gates}").flow_control_on is is_on


def test_flow_control_and_the_policies_that_it_names() -> None:
    config = read_config(
        "{featureGates: [flowControl], plugins: [{type: round-robin-fairness-policy, name: rr}],"
        " flowControl: {maxBytes: 1Gi, defaultRequestTTL: 5s, priorityBands: [{priority: 1, fairnessPolicyRef: rr}]}}"
    )
    assert config.flow_control.request_ttl_s == 5.0
    assert config.flow_control.priority_bands[0].fairness_plugin == "rr"
    assert config.plugin("fcfs-ordering-policy") is not None
    text = "{featureGates: [flowControl], flowControl: {priorityBands: [{priority: 1, fairnessPolicyRef: rr}]}}"
    assert "rr" in refused(text).problem
    assert not read_config(text.replace("[flowControl]", "[]")).flow_control_on


def test_parsers_may_be_named_by_their_type() -> None:
    config = read_config("requestHandler: {parsers: [{pluginRef: openai-parser}]}")
    assert config.parsers == ("openai-parser",)
    assert config.plugin("openai-parser") is not None


# -- older forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["llm-d.ai/v1alpha1", "llm-d.ai/v1", "inference.networking.x-k8s.io/v1alpha1"])
def test_api_versions(version: str) -> None:
    read_config(f"{{apiVersion: {version}, kind: EndpointPickerConfig, plugins: [{{type: queue-scorer}}]}}")


@pytest.mark.parametrize(
    ("older", "now"),
    [
        ("kv-cache-scorer", "kv-cache-utilization-scorer"),
        ("by-label-selector", "label-selector-filter"),
        ("tokenizer", "token-producer"),
        ("model-server-protocol-metrics", "core-metrics-extractor"),
        ("max-score", "max-score-picker"),
        ("single-profile", "single-profile-handler"),
        ("prefill-header-handler", "prefill-header-handler"),
    ],
)
def test_older_types_keep_the_name_that_profiles_know_them_by(older: str, now: str) -> None:
    assert types(read_config(f"plugins: [{{type: {older}}}]")) == {older: now}


@pytest.mark.parametrize("parameters", ["{mode: estimate, hashBlockSize: 64}", "{blockSize: 64, lruCapacityPerServer: 100}"])
def test_a_scorer_that_matched_by_itself_is_split(parameters: str) -> None:
    config = read_config(f"plugins: [{{type: prefix-cache-scorer, name: s, parameters: {parameters}}}]")
    assert types(config) == {APPROX: APPROX, "s": "prefix-cache-scorer"}
    assert producer_of(config, "s") == APPROX


def test_two_scorers_that_matched_by_themselves_have_two_producers() -> None:
    config = read_config(
        "plugins: [{type: prefix-cache-scorer, name: a, parameters: {autoTune: false}},"
        " {type: prefix-cache-scorer, name: b, parameters: {autoTune: true}}]"
    )
    assert (producer_of(config, "a"), producer_of(config, "b")) == (APPROX, "b-producer")


def test_the_precise_scorer_is_a_producer_and_a_scorer() -> None:
    config = read_config(
        "plugins: [{type: precise-prefix-cache-scorer, parameters: {speculativeIndexing: true,"
        " indexerConfig: {tokenProcessorConfig: {blockSize: 64}, kvBlockIndexConfig: {maxPrefixBlocksToMatch: 256}}}}]"
    )
    assert types(config) == {PRECISE_PRODUCER: PRECISE_PRODUCER, "precise-prefix-cache-scorer": "prefix-cache-scorer"}
    assert producer_of(config, "precise-prefix-cache-scorer") == PRECISE_PRODUCER


def test_the_precise_scorer_goes_by_a_producer_that_is_configured() -> None:
    config = read_config(f"plugins: [{{type: precise-prefix-cache-scorer, name: s}}, {{type: {PRECISE_PRODUCER}, name: p}}]")
    assert types(config) == {"s": "prefix-cache-scorer", "p": PRECISE_PRODUCER}
    assert producer_of(config, "s") == "p"


def test_two_producers_leave_the_precise_scorer_without_a_choice() -> None:
    plugins = f"{{type: {PRECISE_PRODUCER}, name: a}}, {{type: {PRECISE_PRODUCER}, name: b}}"
    assert refused(f"plugins: [{plugins}, {{type: precise-prefix-cache-scorer}}]").path == "plugins[2]"


PROFILES = "schedulingProfiles: [{name: decode}, {name: prefill}]"


@pytest.mark.parametrize(
    ("handler", "decider"),
    [
        ("{type: pd-profile-handler, parameters: {threshold: 100, hashBlockSize: 5}}", "prefix-based-pd-decider"),
        ("{type: pd-profile-handler}", "always-disagg-pd-decider"),
        ("{type: disagg-profile-handler, parameters: {deciderPluginName: d}}, {type: always-disagg-pd-decider, name: d}", None),
    ],
)
def test_older_prefill_decode_handlers(handler: str, decider: str | None) -> None:
    config = read_config(f"{{plugins: [{handler}], {PROFILES}}}")
    (parameters,) = config.parameters_of(DisaggProfileHandler.Parameters)
    named = config.plugin(parameters.deciders.prefill)
    assert named is not None
    assert named.type == (decider or "always-disagg-pd-decider")
    for found in config.parameters_of(PrefixBasedPdDecider.Parameters):
        assert found.non_cached_tokens == 25


def test_older_and_new_parameters_of_a_handler_do_not_mix() -> None:
    text = f"{{plugins: [{{type: disagg-profile-handler, parameters: {{decodeProfile: d, profiles: {{}}}}}}], {PROFILES}}}"
    assert refused(text).path == "plugins[0].parameters.profiles"


def test_older_sections_at_the_top() -> None:
    config = read_config(
        "{saturationDetector: {queueDepthThreshold: 7, metricsStalenessThreshold: 1s}, parser: {pluginRef: openai-parser},"
        " data: {injectDefaults: false}}"
    )
    detector = config.plugin("utilization-detector")
    assert detector is not None
    assert detector.parameters.queue_depth_threshold == 7  # type: ignore[attr-defined]
    assert config.parsers == ("openai-parser",)
    assert not config.data_layer.inject_defaults
    assert len(config.notes) == 3


# -- what is refused, and where --------------------------------------------------------------------------------------------


NAMED_TWICE = "{plugins: [{type: disagg-profile-handler}], schedulingProfiles: [{name: a}, {name: a}]}"
HIGH_WEIGHT = "{plugins: [{type: queue-scorer}], schedulingProfiles: [{name: a, plugins: [{pluginRef: q, weight: x}]}]}"


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("plugin: []", "plugin", "plugins"),
        ("plugins: {}", "plugins", "a list"),
        ("plugins: [queue-scorer]", "plugins[0]", "type"),
        ("plugins: [{name: x}]", "plugins[0].type", "is missing"),
        ("plugins: [{type: queue-scorer, parameter: {}}]", "plugins[0].parameter", "parameters"),
        ("plugins: [{type: queue-scorrer}]", "plugins[0].type", "queue-scorer"),
        ("plugins: [{type: topology-affinity-scorer}]", "plugins[0].type", "of llm-d that is not here"),
        ("plugins: [{type: queue-scorer}, {type: queue-scorer}]", "plugins[1].name", "twice"),
        ("plugins: [{type: single-profile-handler}, {type: disagg-profile-handler}]", "plugins", "both"),
        ("schedulingProfiles: [{name: a}, {name: b}]", "plugins", "disagg-profile-handler"),
        ("schedulingProfiles: [{name: ''}]", "schedulingProfiles[0].name", "empty"),
        (NAMED_TWICE, "schedulingProfiles[1].name", "twice"),
        ("schedulingProfiles: [{name: a, plugins: [{pluginRef: x}]}]", "schedulingProfiles[0].plugins[0].pluginRef", "'x'"),
        (HIGH_WEIGHT, "schedulingProfiles[0].plugins[0].weight", "a number"),
        ("plugins: [{type: random-picker}, {type: max-score-picker}]", "schedulingProfiles[0].plugins", "both pickers"),
        ("featureGates: [flowControll]", "featureGates[0]", "flowControl"),
        ("featureGates: [flowControl=maybe]", "featureGates[0]", "neither"),
        ("flowControl: {maxBytes: 5x}", "flowControl.maxBytes", "quantity"),
        ("flowControl: {saturationDetector: {pluginRef: x}}", "flowControl", "'x'"),
        ("dataLayer: {sources: [{pluginRef: x}]}", "dataLayer.sources[0].pluginRef", "'x'"),
        ("requestHandler: {parsers: [{pluginRef: x}]}", "requestHandler.parsers[0].pluginRef", "'x'"),
        ("apiVersion: v2", "apiVersion", "llm-d.ai/v1alpha1"),
        ("kind: Pod", "kind", "EndpointPickerConfig"),
        ("[]", "EndpointPickerConfig", "sections"),
        ("a: &a [x]\nb: *a", "EndpointPickerConfig", "references"),
        ("a: 1\na: 2", "EndpointPickerConfig", "doubled"),
        ("a: 1\n---\nb: 2", "EndpointPickerConfig", "YAML"),
        ("[" * 5_000, "EndpointPickerConfig", "YAML"),
        ("plugins: []" + " " * BYTES_MAX, "EndpointPickerConfig", "larger"),
    ],
)
def test_refusals_name_the_place_and_what_is_allowed(text: str, path: str, says: str) -> None:
    error = refused(text)
    assert error.path == path
    assert says in str(error)


@pytest.mark.parametrize(
    ("plugin", "parameters", "field", "says"),
    [
        ("queue-scorer", "x: 1", "x", "none"),
        (APPROX, "lruCapcityPerServer: 1", "lruCapcityPerServer", "lruCapacityPerServer"),
        ("max-score-picker", "maxNumOfEndpoints: two", "maxNumOfEndpoints", "an integer"),
        ("max-score-picker", "maxNumOfEndpoints: 1.5", "maxNumOfEndpoints", "an integer"),
        ("prefix-based-pd-decider", "nonCachedTokens: -1", "nonCachedTokens", "at least 0"),
        ("metrics-data-source", "interval: 5", "interval", "300ms"),
        ("metrics-data-source", "interval: 5x", "interval", "300ms"),
        ("metrics-data-source", "scheme: ftp", "scheme", "http, https"),
        ("token-producer", "vllm: {uri: x}", "vllm.uri", "url"),
        ("token-producer", "vllm: {}, estimate: {}", "estimate", "excludes"),
        ("by-label", "validValues: [a]", "label", "is missing"),
        ("by-label", "label: x, validValues: [1]", "validValues[0]", "text"),
        ("spread-picker", "nearTie: .nan", "nearTie", "JSON"),
        ("prefix-cache-scorer", "mode: other", "mode", "cache_tracking"),
        ("prefix-cache-scorer", "mode: cache_tracking, blockSze: 1", "blockSze", "matchLengthWeight"),
    ],
)
def test_parameters_that_are_refused(plugin: str, parameters: str, field: str, says: str) -> None:
    error = refused(f"plugins: [{{type: {plugin}, parameters: {{{parameters}}}}}]")
    assert error.path == f"plugins[0].parameters.{field}"
    assert says in str(error)


def test_null_is_a_fields_default_as_in_go() -> None:
    config = read_config(
        "plugins: [{type: max-score-picker, name: null, parameters: {maxNumOfEndpoints: null}}]\ndataLayer: null"
    )
    assert types(config) == {"max-score-picker": "max-score-picker"}


def test_a_config_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "picker.yaml"
    file.write_text(DISAGGREGATED)
    assert load_config(file) == read_config(DISAGGREGATED)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(file)
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path / "absent.yaml")


def test_what_is_wrong_in_a_file_is_told_with_the_files_name_once(tmp_path: Path) -> None:
    file = tmp_path / "picker.yaml"
    file.write_text("plugins: [{type: queue-scorre}]")
    with pytest.raises(ConfigError) as told:
        load_config(file)
    assert told.value.path == f"{file}: plugins[0].type"
    file.write_text("plugins: [")
    with pytest.raises(ConfigError) as told:
        load_config(file)
    assert str(told.value).count(str(file)) == 1


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
FIELDS = "name type parameters pluginRef weight sources extractors mode indexerConfig decodeProfile deciders"
TYPES = f"queue-scorer prefix-cache-scorer pd-profile-handler precise-prefix-cache-scorer by-label {APPROX} default"
WORDS = st.sampled_from([*Document.__struct_encode_fields__, *FIELDS.split(), *TYPES.split()])
TREES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | SCALARS, inner, max_size=4),
    max_leaves=20,
)
PARAMETERS = st.dictionaries(WORDS, TREES, max_size=3)
PLUGINS = st.lists(st.fixed_dictionaries({"type": WORDS}, optional={"name": WORDS, "parameters": PARAMETERS}), max_size=3)


@settings(max_examples=300, deadline=None)
@given(TREES | st.fixed_dictionaries({"plugins": PLUGINS}, optional={"schedulingProfiles": TREES}))
def test_any_tree_is_read_or_refused(tree: object) -> None:
    with contextlib.suppress(ConfigError):
        read_config(yaml.safe_dump(tree, allow_unicode=True))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        read_config(text)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_parameters_of_any_type_are_read_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(plugin_types())))
    fields = Catalog().find(kind, "type").Parameters.__struct_encode_fields__
    names = st.sampled_from(fields) if fields else WORDS
    odd = st.sampled_from([10**30, -(10**30), 1e308, "9" * 40 + "s", "1e99", "tcp://*:5557", {}, []])
    parameters = data.draw(st.dictionaries(names, TREES | odd, max_size=2))
    with contextlib.suppress(ConfigError):
        build_router(read_config(yaml.safe_dump({"plugins": [{"type": kind, "parameters": parameters}]})))
