"""Who gives up, and what passes the router by: drawn from the seed alone, and apart from everything else."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvatlas.sim.workloads.catalog import choose
from kvatlas.sim.workloads.clients import Clients, Impatient
from kvatlas.sim.workloads.foreign import FOREIGN, Beside, Strays
from kvatlas.sim.workloads.workload import Arrival, Workload


def chats(seed: int = 1, **parameters: object) -> Workload:
    return choose("chats", {"qps": 20, "duration_s": 100, **parameters}).open(seed=seed)


def chat(workload: Workload, first: Arrival) -> list[Arrival]:
    """Return a chat's turns, each sent as soon as the one before is there."""
    turns = [first]
    while (following := workload.after(turns[-1], turns[-1].at_s)) is not None:
        turns.append(following)
    return turns


def everything(workload: Workload) -> list[Arrival]:
    return [turn for first in list(workload.arrivals()) for turn in chat(workload, first)]


def test_a_share_of_all_turns_is_cancelled_after_about_as_long_as_asked() -> None:
    def made() -> list[Arrival]:
        return everything(Impatient(chats(), Clients(patience_s=3.0, cancel_share=0.25, cancel_after_s=2.0), seed=1))

    turns = made()
    times_s = [turn.cancel_after_s for turn in turns if turn.cancel_after_s is not None]
    assert {turn.patience_s for turn in turns} == {3.0}
    assert len(times_s) / len(turns) == pytest.approx(0.25, abs=0.05)
    assert sum(times_s) / len(times_s) == pytest.approx(2.0, rel=0.2)
    assert made() == turns


def test_a_share_of_all_turns_goes_to_any_engine_and_the_chats_stay_what_they_are() -> None:
    turns = everything(Strays(chats(), 0.4, range(4), seed=1))
    aimed = [turn.engine for turn in turns if turn.engine is not None]
    assert len(aimed) / len(turns) == pytest.approx(0.4, abs=0.05)
    assert set(aimed) == {0, 1, 2, 3}
    assert [turn.tokens for turn in turns] == [turn.tokens for turn in everything(chats())]


def test_another_workload_beside_goes_to_its_engines_and_shares_nothing() -> None:
    both = Beside(chats(), chats(seed=2, qps=10), (0, 2))
    firsts = list(both.arrivals())
    assert all(one.at_s <= other.at_s for one, other in pairwise(firsts))
    foreign = [turn for first in firsts if first.tenant == FOREIGN for turn in chat(both, first)]
    assert {turn.engine for turn in foreign} == {0, 2}
    assert {turn.tenant for turn in foreign} == {FOREIGN}
    own = [turn for first in firsts if first.tenant != FOREIGN for turn in chat(both, first)]
    assert own == everything(chats())
    assert not {turn.session for turn in own} & {turn.session for turn in foreign}
    assert not {turn.tokens[0] for turn in own} & {turn.tokens[0] for turn in foreign}


def test_a_chat_beside_repeats_what_was_said_in_it() -> None:
    both = Beside(chats(qps=0.1, duration_s=500), chats(seed=2), (1,))
    turns = max((chat(both, first) for first in both.arrivals() if first.tenant == FOREIGN), key=len)
    assert len(turns) > 3
    assert all(later.tokens[: len(earlier.tokens)] == earlier.tokens for earlier, later in pairwise(turns))


def test_another_workload_ends_with_the_first() -> None:
    both = Beside(chats(duration_s=20), chats(seed=2, duration_s=1000), (0,))
    arrivals = list(both.arrivals())
    assert max(one.at_s for one in arrivals) < 20
    assert all(both.after(one, one.at_s) is None for one in arrivals if one.tenant == FOREIGN)
