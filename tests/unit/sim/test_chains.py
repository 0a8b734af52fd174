"""Keys of prompts that share beginnings are those of the key chain, however much was remembered."""

from __future__ import annotations

import random
from array import array

import pytest

from kvatlas.keys import KeySchema
from kvatlas.sim import chains
from kvatlas.sim.chains import Chains
from tests.models.workloads import tokens


@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("block_size_tokens", [16, 64])
def test_keys_are_those_of_the_chain(block_size_tokens: int, natively: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not natively:
        monkeypatch.setattr(chains, "native_block_keys", None)
    rng = random.Random(5)
    known, expected = Chains(block_size_tokens, "m"), KeySchema(block_size_tokens).in_python()
    parts = [tokens(part, rng.randrange(1, 400)) for part in range(4)]
    chats: dict[int, array[int]] = {}
    for number in range(120):
        session = rng.choice([None, 1, 2, 3])
        prompt = rng.choice(parts) + rng.choice(parts) + tokens(number, rng.randrange(0, 200))
        if session is not None:
            prompt = chats.get(session, prompt) + tokens((number, "more"), rng.randrange(0, 100))
            chats[session] = prompt
        assert known.keys(prompt, session).tolist() == expected.keys(prompt, "m"), number


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "native_block_keys", None)
    known = Chains(16, "m", remembered_bytes=10_000)
    for number in range(50):
        known.keys(tokens(number, 500), session=number)
    assert known._bytes == sum(len(data) for data, _ in known._known.values()) <= 10_000


def test_a_prompt_shorter_than_a_block_has_no_keys() -> None:
    known = Chains(16, "m")
    assert not known.keys(tokens("short", 15))
    assert not known.keys(tokens("short", 15), session=1)
    assert len(known.keys(tokens("short", 33), session=1)) == 2
