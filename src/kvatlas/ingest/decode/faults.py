"""Faults: what could not be read inside a payload that could."""

from __future__ import annotations

from kvatlas.types import DecodeFault


class EventFaultError(Exception):
    """One event cannot be read. Caught by the reader of its payload, which goes on with the next event."""

    def __init__(self, reason: str, detail: str, *, harmless: bool = False) -> None:
        self.fault = DecodeFault(reason, detail, harmless)
        super().__init__(detail)


class FaultLog:
    """The faults of one payload, bounded: hostile bytes can hold one fault a byte."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._kept: list[DecodeFault] = []
        self._more = 0
        self._more_harmless = True

    def add(self, fault: DecodeFault) -> None:
        if len(self._kept) < self._kept_max:
            self._kept.append(fault)
            return
        self._more += 1
        self._more_harmless &= fault.harmless

    def faults(self) -> tuple[DecodeFault, ...]:
        """Return the faults in order; those beyond the bound as one, which is harmless only if all of them are."""
        if not self._more:
            return tuple(self._kept)
        summary = DecodeFault("more_faults", f"{self._more} further faults", self._more_harmless)
        return (*self._kept, summary)
