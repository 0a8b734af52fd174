"""Routing policies by name: light ones, peers from their published formulas, and whatever the project's router can be told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvatlas.errors import ConfigError
from kvatlas.route.picker_config import load_config, read_config
from kvatlas.sim.policies.cache_aware import CacheAware
from kvatlas.sim.policies.configs import CONFIGS
from kvatlas.sim.policies.dynamo import Dynamo
from kvatlas.sim.policies.light import LeastLoad, PowerOfTwo, Random, RoundRobin
from kvatlas.sim.policies.policy import Policy, Surroundings
from kvatlas.sim.policies.router import RouterPolicy

__all__ = ["POLICIES", "Policy", "PolicyMaker", "RouterPolicy", "Surroundings", "make_policy"]

PolicyMaker = Callable[[Surroundings], Policy]

_CLASSES: dict[str, PolicyMaker] = {kind.name: kind for kind in (Random, RoundRobin, LeastLoad, PowerOfTwo, CacheAware, Dynamo)}

POLICIES = (*_CLASSES, *CONFIGS)
"""Names that :func:`make_policy` knows; it also takes the path of an EndpointPickerConfig."""


def make_policy(name: str, surroundings: Surroundings) -> Policy:
    """Return a policy by its name, or by the file of its EndpointPickerConfig. Raises ConfigError for what is neither."""
    if name in _CLASSES:
        return _CLASSES[name](surroundings)
    if name in CONFIGS:
        return RouterPolicy(name, read_config(CONFIGS[name], name), surroundings)
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return RouterPolicy(Path(name).stem, load_config(name), surroundings)
    raise ConfigError(
        "policy", f"{name!r:.80} is unknown", f"the path of an EndpointPickerConfig (.yaml), {', '.join(POLICIES)}"
    )
