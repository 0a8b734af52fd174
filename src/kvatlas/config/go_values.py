"""Durations and quantities as Go and Kubernetes write them, for files that were written for llm-d: "1m30s", "1Gi", "5k"."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from kvatlas.config.quantities import Seconds

GO_DURATION_FORMS = 'a duration such as "300ms", "60s", "1m30s", "2h"'
QUANTITY_FORMS = 'a quantity such as 5000, "5k", "500M", "1Gi"'

_SECONDS_BY_UNIT = {
    "h": Fraction(3600),
    "m": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 10**3),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),  # U+00B5, the micro sign
    "μs": Fraction(1, 10**6),
    "ns": Fraction(1, 10**9),
}
_FACTOR_BY_SUFFIX = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    "": Fraction(1),
    **{suffix: Fraction(10 ** (3 * power)) for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Fraction(1 << (10 * power)) for power, suffix in enumerate("KMGTPE", start=1)},
}

_NUMBER = r"(?:[0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"
_UNIT = "|".join(sorted(_SECONDS_BY_UNIT, key=len, reverse=True))
_PART = re.compile(rf"({_NUMBER})({_UNIT})")
_DURATION = re.compile(rf"\+?(?:0|(?:{_NUMBER}(?:{_UNIT}))+)")
_QUANTITY = re.compile(rf"\+?({_NUMBER})(?:(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)|[eE]([+-]?[0-9]{{1,2}}))?")


def parse_go_duration(text: str) -> Seconds:
    """Return a duration in seconds. Raises ValueError for what is none, and for one below zero.

    Source: Go, ``time.ParseDuration``: every number has a unit, except for a lone 0.
    """
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r:.60} is no duration; allowed: {GO_DURATION_FORMS}")
    return Seconds(float(sum(Fraction(number) * _SECONDS_BY_UNIT[unit] for number, unit in _PART.findall(text))))


def parse_quantity(value: int | float | str) -> int:
    """Return a whole number, rounded up. Raises ValueError for what is no quantity, and for one below zero.

    Source: Kubernetes, ``resource.Quantity`` and its ``Value()``.
    """
    match = None if isinstance(value, bool) else _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r:.60} is no quantity; allowed: {QUANTITY_FORMS}")
    number, suffix, exponent = match.groups()
    factor = Fraction(10) ** int(exponent) if exponent else _FACTOR_BY_SUFFIX[suffix or ""]
    return math.ceil(Fraction(number) * factor)
