"""How an engine's block size and the index's go together."""

from __future__ import annotations

import math

import msgspec

from kvatlas.doctor.check import CheckList


class BlockSizeMatch(msgspec.Struct, frozen=True):
    """The index's block size, and those of an engine's attention groups or of several engines; all in tokens."""

    index_tokens: int
    engine_tokens: frozenset[int]

    def report(self, found: CheckList) -> None:
        """Say whether predictions are exact: they are where each engine block is one index block or several."""
        sizes = sorted(self.engine_tokens)
        seen = f"engine {', '.join(map(str, sizes))}, index {self.index_tokens}"
        inexact = [size for size in sizes if size % self.index_tokens]
        if not inexact:
            blocks = ", ".join(sorted({str(size // self.index_tokens) for size in sizes}))
            found.ok("block size", f"{seen}: an engine block is {blocks} of the index's; predictions are exact")
            return
        step = math.lcm(self.index_tokens, *sizes)
        best = math.gcd(*sizes)
        meaning = f"prefixes are matched in steps of {step} tokens, so what is found is a lower bound"
        found.warn("block size", f"{seen}: {meaning}", f"set keys.blockSize to {best} or a divisor of it")

    def report_for_hashes(self, found: CheckList) -> None:
        """Say the same where keys are engine hashes: then the index's blocks have to be the engine's own."""
        sizes = sorted(self.engine_tokens)
        seen = f"engine {', '.join(map(str, sizes))}, index {self.index_tokens}"
        if sizes == [self.index_tokens]:
            found.ok("block size", f"{seen}: equal, as keys.mode: engine needs it")
        elif len(sizes) == 1:
            meaning = "keys are the engine's hashes, and blocks of another size are refused"
            found.fail("block size", f"{seen}: {meaning}", f"set keys.blockSize: {sizes[0]}")
        else:
            meaning = "keys are engine hashes, and those of blocks of several sizes do not make up one chain"
            found.fail("block size", f"{seen}: {meaning}", "set keys.mode: kvatlas")
