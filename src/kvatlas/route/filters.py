"""Filters by label: roles in disaggregated serving, and any other. Source: llm-d-router, bylabel filters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.endpoint import ROLE_LABEL
from kvatlas.route.plugins import NoParameters, Services

DECODES = frozenset({"decode", "prefill-decode", "both", "encode-prefill-decode"})
PREFILLS = frozenset({"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"})
ENCODES = frozenset({"encode", "encode-prefill", "encode-prefill-decode"})
"""Values of the label ``llm-d.ai/role``; ``both`` is the older name of ``prefill-decode``."""


class _ByRole:
    """Keeps who has one of a few roles."""

    Parameters = NoParameters
    roles: frozenset[str]
    unlabelled = False

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[Candidate]:
        return _labelled(candidates, ROLE_LABEL, self.roles, self.unlabelled)


class DecodeFilter(_ByRole):
    """Keeps who decodes, and who has no role: an engine that nobody has labelled does everything."""

    roles = DECODES
    unlabelled = True


class PrefillFilter(_ByRole):
    """Keeps who computes prompts for others."""

    roles = PREFILLS


class EncodeFilter(_ByRole):
    """Keeps who encodes images, audio and video for others."""

    roles = ENCODES


class ByLabel:
    """Keeps who has one of some values of a label. Source: llm-d-router, by-label (deprecated there)."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
        label: Annotated[str, msgspec.Meta(min_length=1)]
        valid_values: tuple[str, ...] = ()
        allows_no_label: bool = False

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError for parameters that nobody could meet."""
        if not parameters.valid_values and not parameters.allows_no_label:
            raise ConfigError(f"{name}.validValues", "is empty, and so would be what is kept", "values, or allowsNoLabel: true")
        self._label = parameters.label
        self._values = frozenset(parameters.valid_values)
        self._unlabelled = parameters.allows_no_label

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[Candidate]:
        return _labelled(candidates, self._label, self._values, self._unlabelled)


class Requirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of a selector's matchExpressions."""

    key: Annotated[str, msgspec.Meta(min_length=1)]
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.operator in ("In", "NotIn") and not self.values:
            raise ValueError(f"values: is empty; allowed: at least one value for {self.operator}")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            raise ValueError(f"values: {self.operator} takes none; allowed: no values")

    def met(self, labels: Mapping[str, str]) -> bool:
        """Tell whether an endpoint's labels meet it. Source: Kubernetes, labels.Requirement (NotIn: also without the label)."""
        if self.operator == "In":
            return labels.get(self.key) in self.values
        if self.operator == "NotIn":
            return labels.get(self.key) not in self.values
        return (self.key in labels) == (self.operator == "Exists")


class LabelSelectorFilter:
    """Keeps whose labels a Kubernetes label selector selects; an empty one selects everybody."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        match_labels: dict[str, str] = {}
        match_expressions: tuple[Requirement, ...] = ()

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        equal = (Requirement(key, "In", (value,)) for key, value in parameters.match_labels.items())
        self._requirements = (*equal, *parameters.match_expressions)

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[Candidate]:
        return [one for one in candidates if all(each.met(one.endpoint.labels) for each in self._requirements)]


def _labelled(candidates: Sequence[Candidate], label: str, values: frozenset[str], unlabelled: bool) -> list[Candidate]:
    kept = []
    for candidate in candidates:
        value = candidate.endpoint.labels.get(label)
        if unlabelled if value is None else value in values:
            kept.append(candidate)
    return kept
