"""Profile handlers and deciders: what runs, in which order, and what it comes to."""

from __future__ import annotations

import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Cycle
from kvatlas.route.deciders import AlwaysDisaggMultimodalDecider, AlwaysDisaggPdDecider, PrefixBasedPdDecider
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.handlers import DisaggProfileHandler, SingleProfileHandler
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import Conclusion, NoParameters
from kvatlas.types import MultimodalItem
from tests.unit.route.made import candidate, cycle, held, run, services

PROFILES = {"decode": None, "prefill": None, "encode": None}


class Says:
    """A decider that counts how often it is asked."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def elsewhere(self, cycle: Cycle, endpoint: Endpoint) -> bool:
        self.asked.append(endpoint.name)
        return self.answer


def handler(prefill: object = None, encode: object = None, **parameters: object) -> DisaggProfileHandler:
    deciders = {name: name for name, one in (("prefill", prefill), ("encode", encode)) if one is not None}
    read = read_parameters(DisaggProfileHandler.Parameters, {"deciders": deciders, **parameters}, "p")
    return DisaggProfileHandler("h", read, services(prefill=prefill, encode=encode))


def played(
    one: DisaggProfileHandler, profiles: object = PROFILES, *, nobody: tuple[str, ...] = ()
) -> tuple[list[str], Conclusion | None]:
    """Return which profiles ran, one after the other, and what they came to. Profile x picks endpoint x."""
    runs: dict[str, object] = {}
    while names := one.next_profiles(cycle(), profiles, runs):  # type: ignore[arg-type]
        (name,) = names
        assert name not in runs
        runs[name] = None if name in nobody else run(name, name)
    return list(runs), one.conclude(cycle(), runs)  # type: ignore[arg-type]


def test_decode_runs_first_and_alone_without_deciders() -> None:
    assert played(handler()) == (["decode"], Conclusion("decode"))


def test_deciders_are_asked_of_the_decoding_endpoint_once_each() -> None:
    prefill, encode = Says(True), Says(False)
    assert played(handler(prefill, encode)) == (["decode", "prefill"], Conclusion("decode", "prefill"))  # type: ignore[arg-type]
    assert (prefill.asked, encode.asked) == (["decode"], ["decode"])


def test_images_are_encoded_before_the_prompt_is_computed() -> None:
    ran, conclusion = played(handler(Says(True), Says(True)))
    assert ran == ["decode", "encode", "prefill"]
    assert conclusion == Conclusion("decode", "prefill", ("encode",))  # type: ignore[arg-type]


def test_a_stage_without_a_profile_is_done_by_the_decoder() -> None:
    assert played(handler(Says(True), Says(True)), {"decode": None}) == (["decode"], Conclusion("decode"))


def test_a_stage_that_finds_nobody_is_done_by_the_decoder() -> None:
    assert played(handler(Says(True)), nobody=("prefill",)) == (["decode", "prefill"], Conclusion("decode"))


def test_nobody_who_decodes_is_nobody_at_all() -> None:
    assert played(handler(Says(True)), nobody=("decode",)) == (["decode"], None)


def test_prefill_first_needs_no_decider() -> None:
    ran, conclusion = played(handler(encode=Says(True), stageOrder="prefill-first"))
    assert ran == ["prefill", "encode", "decode"]
    assert conclusion == Conclusion("decode", "prefill", ("encode",))  # type: ignore[arg-type]
    assert played(handler(stageOrder="prefill-first"), nobody=("prefill",))[1] == Conclusion("decode")


def test_prefill_first_with_a_decider_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill comes first"):
        handler(Says(True), stageOrder="prefill-first")


def test_profiles_may_have_other_names() -> None:
    one = handler(Says(True), profiles={"decode": "d", "prefill": "p"})
    assert played(one, {"d": None, "p": None}) == (["d", "p"], Conclusion("d", "p"))  # type: ignore[arg-type]


def test_a_request_is_not_split_between_an_endpoint_and_itself() -> None:
    runs = {"decode": run("decode", "a", "b"), "prefill": run("prefill", "a")}
    assert handler().conclude(cycle(), runs) == Conclusion("decode")


def test_what_is_no_decider_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"h\.deciders\.prefill"):
        handler(object())


def test_handlers_say_which_profiles_they_need() -> None:
    single = SingleProfileHandler("s", NoParameters(), services())
    single.check_profiles(["default"])
    with pytest.raises(ConfigError, match="2 profiles"):
        single.check_profiles(["a", "b"])
    handler().check_profiles(["prefill", "decode"])
    with pytest.raises(ConfigError, match="'decode'"):
        handler().check_profiles(["default"])


def decides(tokens: int, cached: int, *, producer: str = "", **parameters: int) -> bool:
    decider = PrefixBasedPdDecider(
        "d", PrefixBasedPdDecider.Parameters(prefix_match_info_producer_name=producer, **parameters), services()
    )
    made = cycle(tokens=tokens)
    made.matches["first"] = held(a=cached)
    made.matches["second"] = held(a=0)
    return decider.elsewhere(made, candidate("a").endpoint)


@pytest.mark.parametrize(
    ("tokens", "cached", "least", "elsewhere"),
    [
        (64, 0, 0, False),  # off
        (64, 48, 16, True),  # 64 - 3 * 16 >= 16
        (64, 48, 17, False),
        (15, 0, 16, False),  # shorter than the threshold
        (16, 0, 16, True),
        (64, 64, 1, False),
    ],
)
def test_a_prompt_is_computed_elsewhere_if_enough_of_it_is_not_cached(
    tokens: int, cached: int, least: int, elsewhere: bool
) -> None:
    assert decides(tokens, cached, non_cached_tokens=least) is elsewhere


def test_short_prompts_stay_whole() -> None:
    assert not decides(99, 0, non_cached_tokens=16, prompt_tokens=100)
    assert decides(100, 0, non_cached_tokens=16, prompt_tokens=100)


def test_the_producer_that_is_named_counts() -> None:
    assert not decides(64, 64, non_cached_tokens=16)
    assert decides(64, 64, non_cached_tokens=16, producer="second")


def test_a_prompt_of_which_nothing_is_known_stays_whole_and_the_decision_says_so() -> None:
    decider = PrefixBasedPdDecider("d", PrefixBasedPdDecider.Parameters(non_cached_tokens=1), services())
    made = cycle()
    assert not decider.elsewhere(made, candidate("a").endpoint)
    assert "d: nothing is known" in made.notes[0]


def test_other_deciders() -> None:
    item = MultimodalItem("image-hash", 0, 4)
    multimodal = AlwaysDisaggMultimodalDecider("d", NoParameters(), services())
    assert AlwaysDisaggPdDecider("d", NoParameters(), services()).elsewhere(cycle(), candidate("a").endpoint)
    assert multimodal.elsewhere(cycle(multimodal=(item,)), candidate("a").endpoint)
    assert not multimodal.elsewhere(cycle(), candidate("a").endpoint)
