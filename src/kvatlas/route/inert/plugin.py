"""What all of them are: a name and parameters."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from kvatlas.route.plugins import NoParameters, Services


class Inert:
    """Does nothing in a decision."""

    Parameters: ClassVar[type[msgspec.Struct]] = NoParameters
    adopted: ClassVar[frozenset[str]] = frozenset()
    """Parameters, as they are written, that settings of kvatlas are taken from."""
    done_by: ClassVar[str]
    """Who does its work here."""

    def __init__(self, name: str, parameters: Any, services: Services) -> None:
        self.name = name
        self.parameters = parameters
