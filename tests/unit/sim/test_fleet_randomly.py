"""Whatever happens to a fleet, every request is accounted for, and the index ends up where engines' events leave it."""

from __future__ import annotations

import random

import msgspec
import pytest

from kvatlas.config import Config, IndexSettings, KeySettings
from kvatlas.index.choice import Core
from kvatlas.indexer import Indexer
from kvatlas.sim.changes import Change, EngineJoins, EngineLeaves, EngineSlows
from kvatlas.sim.engines import EngineSpec, TierSpec
from kvatlas.sim.events import EventPath
from kvatlas.sim.fleet import simulate
from kvatlas.sim.policies import POLICIES, Surroundings, router
from kvatlas.sim.reference import ReferenceEngines
from kvatlas.sim.workloads.clients import Clients, Impatient
from kvatlas.sim.workloads.foreign import Strays
from kvatlas.sim.workloads.workload import Arrival
from tests.models.workloads import COSTS, Given, arrival, tokens


def spec(rng: random.Random) -> EngineSpec:
    tiers = (TierSpec(name="cpu", blocks=rng.randrange(1, 200), load_block_s=rng.choice([0.0, 1e-4])),)
    return EngineSpec(
        costs=COSTS,
        gpu_blocks=rng.choice([40, 80, 400]),
        block_size_tokens=rng.choice([16, 16, 32]),
        step_tokens_max=rng.choice([64, 512]),
        running_max=rng.choice([2, 8]),
        tiers=rng.choice([(), tiers]),
    )


def changes(rng: random.Random, engines: int) -> list[Change]:
    leaving = rng.sample(range(engines), rng.randrange(engines))
    made: list[Change] = [EngineLeaves(rng.uniform(0.0, 4.0), engine) for engine in leaving]
    made += [EngineSlows(0.0, engine, rng.choice([0.5, 3.0])) for engine in range(engines) if rng.random() < 0.3]
    made += [EngineJoins(rng.uniform(0.0, 4.0), spec(rng)) for _ in range(rng.randrange(3))]
    return made


def workload(rng: random.Random) -> Given:
    prefixes = [tokens(("prefix", at), rng.randrange(10, 400)) for at in range(4)]
    made, at_s = [], 0.0
    for number in range(40):
        at_s += rng.choice([0.0, 0.02, 0.3])
        parts = (rng.choice(prefixes), tokens(number, rng.randrange(1, 300)))
        made.append(arrival(at_s, *parts, output=rng.randrange(1, 60), session=number % 7))
    turns = dict.fromkeys(range(7), 0)

    def after(answered: Arrival, at_s: float) -> Arrival | None:
        session = answered.session or 0
        turns[session] += 1
        if turns[session] > 3:
            return None
        prompt = answered.tokens + tokens((session, turns[session]), 30)
        return Arrival(at_s + 0.1 * session, prompt + tokens((session, "answer"), 9), len(prompt), session)

    return Given(made, after)


@pytest.mark.parametrize("policy", [*POLICIES[4:6], "llm-d-precise", "kvatlas", "least-load"])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_accounted_for(seed: int, policy: str) -> None:
    rng = random.Random(f"{seed} {policy}")
    specs = [spec(rng) for _ in range(rng.randrange(1, 4))]
    path = EventPath(lag_s=0.01, jitter_s=0.05, loss=0.1, replay_after_s=rng.choice([None, 0.1]))
    happens = changes(rng, len(specs))
    clients = Clients(patience_s=rng.choice([None, 0.2, 5.0]), cancel_share=rng.choice([0.0, 0.3]), cancel_after_s=0.5)
    users = Strays(Impatient(workload(rng), clients, seed), rng.choice([0.0, 0.2]), range(3), seed)
    result = simulate(users, policy, specs, seed=seed, engines=ReferenceEngines(), path=path, changes=happens)
    told = f"seed {seed}: {result}"
    assert result.arrived == result.finished + result.refused + result.gave_up + result.cancelled, told
    assert result.finished == sum(engine.requests for engine in result.engines) == result.ttft.count == result.e2e.count, told
    assert result.finished == sum(moment.finished for moment in result.moments), told
    assert result.arrived == sum(moment.arrived for moment in result.moments), told
    assert 0 <= result.loaded_tokens <= result.cached_tokens < max(1, result.prompt_tokens), told
    assert all(0 <= engine.busy <= 1 and 0 <= engine.kv_usage_mean <= 1 for engine in result.engines), told
    assert result.queue.max <= result.ttft.max <= result.e2e.max <= result.duration_s + 1e-9, told
    assert (result.moments[-1].waiting, result.moments[-1].running) == (0, 0), told


@pytest.mark.parametrize("policy", ["llm-d-precise", "kvatlas"])
def test_native_and_reference_cores_come_to_the_same_result(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("kvatlas.sim.native")
    specs = [spec(random.Random(f"{number}")) for number in range(3)]
    path = EventPath(lag_s=0.01, jitter_s=0.05, loss=0.1)
    results = []
    for make, core in ((native.NativeEngines, "native"), (ReferenceEngines, "native"), (ReferenceEngines, "reference")):

        def indexer(surroundings: Surroundings, core: Core = core) -> Indexer:
            keys = KeySettings(block_size=surroundings.block_size_tokens)
            return Indexer(Config(keys=keys, index=IndexSettings(core=core)), clock=surroundings.clock)

        monkeypatch.setattr(router, "make_indexer", indexer)
        result = simulate(workload(random.Random(4)), policy, specs, seed=4, engines=make(), path=path)
        results.append(msgspec.structs.replace(result, wall_s=0.0))
    assert results[0] == results[1] == results[2]
    assert any("frames of events were lost" in note for note in results[0].notes)
