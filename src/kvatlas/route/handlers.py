"""Profile handlers: which profiles run for a request, and which of them chose where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Cycle
from kvatlas.route.decision import ProfileRun
from kvatlas.route.plugins import Conclusion, Decider, NoParameters, Services
from kvatlas.route.profile import Profile

Runs = Mapping[str, ProfileRun | None]


@runtime_checkable
class ChecksProfiles(Protocol):
    """A handler that needs certain profiles, and says so before the first request."""

    def check_profiles(self, names: Sequence[str]) -> None:
        """Raises ConfigError where the configured profiles are not those that it needs."""
        ...


class SingleProfileHandler:
    """Runs the only profile. Source: llm-d-router, single-profile-handler."""

    Parameters = NoParameters

    def __init__(self, name: str, parameters: NoParameters, services: Services) -> None:
        self.name = name

    def check_profiles(self, names: Sequence[str]) -> None:
        if len(names) != 1:
            raise ConfigError("schedulingProfiles", f"{len(names)} profiles, and {self.name} runs one", "one profile")

    def next_profiles(self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Runs) -> Sequence[str]:
        return () if runs else tuple(profiles)

    def conclude(self, cycle: Cycle, runs: Runs) -> Conclusion | None:
        return Conclusion(next(iter(runs))) if runs else None


class Stages(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The profile of each stage."""

    decode: str = "decode"
    prefill: str = "prefill"
    encode: str = "encode"


class Deciders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plugins that say whether a stage is somebody else's. Empty: it never is."""

    prefill: str = ""
    encode: str = ""


class DisaggProfileHandler:
    """Decoding, computing the prompt and encoding its images on endpoints of their own, where deciders say so.

    decode-first:   decode -> encode, if its decider says so -> prefill, if its decider says so
    prefill-first:  prefill -> encode, if its decider says so -> decode

    A stage whose profile is not configured, or finds nobody, is done by whoever decodes. Where the same endpoint is picked to
    decode and to prefill, the request is not split. Source: llm-d-router, disagg-profile-handler.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        profiles: Stages = Stages()
        deciders: Deciders = Deciders()
        stage_order: Literal["decode-first", "prefill-first"] = "decode-first"

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        """Raises ConfigError where a decider is none, or is asked for where nobody could ask it."""
        self.name = name
        self._stages = parameters.profiles
        self._decode_first = parameters.stage_order == "decode-first"
        if not self._decode_first and parameters.deciders.prefill:
            raise ConfigError(f"{name}.deciders.prefill", "has no say where prefill comes first", "no decider, or decode-first")
        self._prefill_decider = _decider(f"{name}.deciders.prefill", parameters.deciders.prefill, services)
        self._encode_decider = _decider(f"{name}.deciders.encode", parameters.deciders.encode, services)

    def check_profiles(self, names: Sequence[str]) -> None:
        if self._stages.decode not in names:
            problem = f"no profile is called {self._stages.decode!r}, which {self.name} needs"
            raise ConfigError("schedulingProfiles", problem, f"a profile for it, or {self.name}.profiles.decode")

    def next_profiles(self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Runs) -> Sequence[str]:
        if self._decode_first:
            return self._after_decode(cycle, profiles, runs)
        return self._before_decode(cycle, profiles, runs)

    def conclude(self, cycle: Cycle, runs: Runs) -> Conclusion | None:
        decode = runs.get(self._stages.decode)
        if decode is None:
            return None
        prefill, encode = runs.get(self._stages.prefill), runs.get(self._stages.encode)
        computes_prompt = None if prefill is None else prefill.picked[0].name
        return Conclusion(
            self._stages.decode,
            prefill=None if computes_prompt == decode.picked[0].name else computes_prompt,
            encoders=() if encode is None else tuple(one.name for one in encode.picked),
        )

    def _after_decode(self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Runs) -> Sequence[str]:
        stages = self._stages
        if stages.decode not in runs:
            return (stages.decode,)
        decode = runs[stages.decode]
        if decode is None or stages.prefill in runs:
            return ()
        for stage, decider in ((stages.encode, self._encode_decider), (stages.prefill, self._prefill_decider)):
            missing = stage in profiles and stage not in runs
            if missing and decider is not None and decider.elsewhere(cycle, decode.picked[0].endpoint):
                return (stage,)
        return ()

    def _before_decode(self, cycle: Cycle, profiles: Mapping[str, Profile], runs: Runs) -> Sequence[str]:
        stages = self._stages
        if stages.decode in runs:
            return ()
        if stages.prefill in profiles and stages.prefill not in runs:
            return (stages.prefill,)
        prefill, decider = runs.get(stages.prefill), self._encode_decider
        missing = stages.encode in profiles and stages.encode not in runs
        if missing and prefill is not None and decider is not None and decider.elsewhere(cycle, prefill.picked[0].endpoint):
            return (stages.encode,)
        return (stages.decode,)


def _decider(path: str, ref: str, services: Services) -> Decider | None:
    if not ref:
        return None
    plugin = services.plugin(ref)
    if not isinstance(plugin, Decider):
        raise ConfigError(path, f"{ref} is no decider", "a plugin such as prefix-based-pd-decider")
    return plugin
