"""Filters by label."""

from __future__ import annotations

import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.filters import ByLabel, DecodeFilter, EncodeFilter, LabelSelectorFilter, PrefillFilter
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import Filter, NoParameters
from tests.unit.route.made import candidate, cycle, services

ROLES = ["decode", "prefill", "encode", "prefill-decode", "encode-prefill", "encode-prefill-decode", "both", "other"]
EVERYBODY = [candidate("unlabelled"), *(candidate(role, role=role) for role in ROLES)]


def kept(by: Filter) -> set[str]:
    return {one.name for one in by.filter(cycle(EVERYBODY), EVERYBODY)}


def test_roles() -> None:
    prefill = {"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"}
    assert kept(DecodeFilter("f", NoParameters(), services())) == {
        "unlabelled",
        "decode",
        "prefill-decode",
        "both",
        "encode-prefill-decode",
    }
    assert kept(PrefillFilter("f", NoParameters(), services())) == prefill
    assert kept(EncodeFilter("f", NoParameters(), services())) == {"encode", "encode-prefill", "encode-prefill-decode"}


def by_label(**parameters: object) -> Filter:
    return ByLabel("f", ByLabel.Parameters(**parameters), services())  # type: ignore[arg-type]


def test_by_label_keeps_values_and_on_demand_who_has_no_label() -> None:
    assert kept(by_label(label="llm-d.ai/role", valid_values=("decode", "other"))) == {"decode", "other"}
    assert kept(by_label(label="llm-d.ai/role", valid_values=("decode",), allows_no_label=True)) == {"decode", "unlabelled"}


def test_by_label_that_would_keep_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowsNoLabel"):
        by_label(label="x")


LABELS = {"a": {"zone": "1", "gpu": "h100"}, "b": {"zone": "2"}, "c": {}}


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({}, "abc"),
        ({"matchLabels": {"zone": "1"}}, "a"),
        ({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["1", "2"]}]}, "ab"),
        ({"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["1"]}]}, "bc"),
        ({"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}, "a"),
        ({"matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]}, "bc"),
        ({"matchLabels": {"zone": "2"}, "matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]}, "b"),
    ],
)
def test_label_selectors_select_as_in_kubernetes(selector: object, names: str) -> None:
    by = LabelSelectorFilter("f", read_parameters(LabelSelectorFilter.Parameters, selector, "p"), services())
    candidates = [candidate(name, labels=labels) for name, labels in LABELS.items()]
    assert "".join(one.name for one in by.filter(cycle(candidates), candidates)) == names


@pytest.mark.parametrize(
    ("expression", "path"),
    [
        ({"key": "a", "operator": "In"}, "p.matchExpressions[0].values"),
        ({"key": "a", "operator": "Exists", "values": ["x"]}, "p.matchExpressions[0].values"),
        ({"key": "a", "operator": "Like"}, "p.matchExpressions[0].operator"),
        ({"operator": "Exists"}, "p.matchExpressions[0].key"),
    ],
)
def test_selectors_that_make_no_sense_are_refused(expression: object, path: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_parameters(LabelSelectorFilter.Parameters, {"matchExpressions": [expression]}, "p")
    assert raised.value.path == path
