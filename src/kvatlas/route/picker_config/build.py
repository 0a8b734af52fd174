"""From a complete configuration to a router: plugins are made as they are needed, each once."""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.handlers import ChecksProfiles
from kvatlas.route.log import DecisionLog
from kvatlas.route.parameters import unknown_name
from kvatlas.route.picker_config.catalog import Catalog
from kvatlas.route.picker_config.spec import PickerConfig, PluginSpec, ProfileSpec
from kvatlas.route.plugins import Filter, Picker, Producer, ProfileHandler, Scorer, Services
from kvatlas.route.profile import NamedFilter, Profile, WeightedScorer
from kvatlas.route.router import Router
from kvatlas.route.scheduler import NamedProducer, Scheduler

if TYPE_CHECKING:
    from kvatlas.indexer import Indexer

T = TypeVar("T")


def build_router(
    config: PickerConfig,
    *,
    index: Indexer | None = None,
    clock: Callable[[], float] = time.monotonic,
    random: random_module.Random | None = None,
    failed: Callable[[str, Exception], None] = lambda _name, _error: None,
    log: DecisionLog | None = None,
    healthy: Callable[[EndpointName], bool] | None = None,
    catalog: Catalog | None = None,
) -> Router:
    """Return a router that decides as the configuration says. Raises ConfigError where plugins do not fit together.

    ``index``: what precise prefix matching asks; ``failed``: told of a producer that raised in a decision;
    ``healthy``: as for :class:`Router`.
    """
    drawn = random or random_module.Random()  # noqa: S311  spreads load, guards nothing
    workshop = Workshop(config, catalog or Catalog(), index=index, clock=clock, random=drawn)
    plugins = workshop.all()
    handler = workshop.that_is(ProfileHandler, config.handler)  # type: ignore[type-abstract]
    if isinstance(handler, ChecksProfiles):
        handler.check_profiles([profile.name for profile in config.profiles])
    scheduler = Scheduler(
        tuple(NamedProducer(name, plugin) for name, plugin in plugins.items() if isinstance(plugin, Producer)),
        {profile.name: _profile(profile, workshop) for profile in config.profiles},
        handler,
        failed=failed,
    )
    return Router(scheduler, plugins, clock=clock, random=drawn, log=log, healthy=healthy)


class Workshop:
    """Makes a configuration's plugins. One that asks for another while it is made gets it made first."""

    def __init__(
        self,
        config: PickerConfig,
        catalog: Catalog,
        *,
        index: Indexer | None,
        clock: Callable[[], float],
        random: random_module.Random,
    ) -> None:
        self._specs = {spec.name: spec for spec in config.plugins}
        self._catalog = catalog
        self._services = Services(plugin=self.plugin, clock=clock, random=random, index=index)
        self._made: dict[str, object] = {}
        self._in_work: list[str] = []

    def all(self) -> dict[str, object]:
        """Return every plugin by its name, in the configuration's order."""
        return {name: self.plugin(name) for name in self._specs}

    def plugin(self, name: str) -> object:
        """Return one plugin. Raises ConfigError where there is none, and where plugins wait for each other in a circle."""
        if name in self._made:
            return self._made[name]
        spec = self._specs.get(name)
        if spec is None:
            asking = self._specs[self._in_work[-1]].path if self._in_work else ""
            raise unknown_name(asking or "plugins", "plugin", name, list(self._specs))
        if name in self._in_work:
            circle = " -> ".join([*self._in_work[self._in_work.index(name) :], name])
            raise ConfigError(spec.path or name, f"plugins need each other in a circle: {circle}", "references that end")
        self._in_work.append(name)
        try:
            made = self._made[name] = self._make(spec)
        finally:
            self._in_work.pop()
        return made

    def that_is(self, protocol: type[T], name: str) -> T:
        plugin = self.plugin(name)
        if not isinstance(plugin, protocol):
            raise ConfigError(self._specs[name].path or name, f"{name} is no {protocol.__name__}", "a plugin that is one")
        return plugin

    def _make(self, spec: PluginSpec) -> object:
        kind = self._catalog.find(spec.type, spec.path or "plugins")
        try:
            return kind(spec.name, spec.parameters, self._services)
        except ConfigError as error:
            own, _, field = error.path.partition(".")
            if own != spec.name or not field or not spec.path:
                raise
            raise ConfigError(f"{spec.path}.parameters.{field}", error.problem, error.allowed) from None


def _profile(profile: ProfileSpec, workshop: Workshop) -> Profile:
    made = [(one, workshop.plugin(one.plugin)) for one in profile.plugins]
    (picker,) = (plugin for _, plugin in made if isinstance(plugin, Picker))
    return Profile(
        profile.name,
        tuple(NamedFilter(one.plugin, plugin) for one, plugin in made if isinstance(plugin, Filter)),
        tuple(WeightedScorer(one.plugin, plugin, one.weight) for one, plugin in made if isinstance(plugin, Scorer)),
        picker,
    )
