"""What the same requests would find cached if they were sent to the engines in turns."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from kvatlas.sim.chains import Chains


class InTurns:
    """Engines with a cache each, the least recently used blocks of which go first. Every request goes to the next engine."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self._block_size = block_size
        self._chains = Chains(block_size, model="")
        self._blocks = blocks
        self._caches: dict[str, OrderedDict[int, None]] = {}
        self._turn = 0

    def join(self, engine: str) -> None:
        self._caches[engine] = OrderedDict()

    def leave(self, engine: str) -> None:
        self._caches.pop(engine, None)

    def send(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's tokens the engine whose turn it is has cached. It has all of them from now on."""
        cache = list(self._caches.values())[self._turn % len(self._caches)]
        self._turn += 1
        size = self._block_size
        keys = self._chains.keys(array("I", prompt))
        usable = keys[: (len(prompt) - 1) // size]
        held = next((at for at, one in enumerate(usable) if one not in cache), len(usable))
        for one in reversed(keys):
            cache[one] = None
            cache.move_to_end(one)
        while len(cache) > self._blocks:
            cache.popitem(last=False)
        return held * size
