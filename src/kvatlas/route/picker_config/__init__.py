"""llm-d's EndpointPickerConfig: read as llm-d reads it, completed with its defaults, and built into a router.

config = read_config(text)  # or load_config(path); "" is llm-d's default
router = build_router(config, index=indexer)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvatlas.errors import ConfigError
from kvatlas.route.picker_config.build import build_router
from kvatlas.route.picker_config.catalog import Catalog
from kvatlas.route.picker_config.complete import DEFAULT, complete
from kvatlas.route.picker_config.document import parse, read_text
from kvatlas.route.picker_config.spec import PickerConfig, PluginSpec, ProfilePlugin, ProfileSpec

__all__ = [
    "Catalog",
    "PickerConfig",
    "PluginSpec",
    "ProfilePlugin",
    "ProfileSpec",
    "build_router",
    "in_file",
    "load_config",
    "read_config",
]


def read_config(text: str, source: str = "EndpointPickerConfig", *, catalog: Catalog | None = None) -> PickerConfig:
    """Return the configuration that a text stands for; no text at all is llm-d's default. Raises ConfigError.

    ``source`` names the text in errors that no field can be blamed for; ``catalog``: plugin types, by default all installed.
    """
    return complete(parse(text, source) if text else DEFAULT, catalog or Catalog())


def load_config(file: str | os.PathLike[str], *, catalog: Catalog | None = None) -> PickerConfig:
    """Return the configuration in a file. Raises ConfigError, which names the file."""
    with in_file(file):
        return read_config(read_text(file), str(file), catalog=catalog)


@contextmanager
def in_file(file: str | os.PathLike[str] | None) -> Iterator[None]:
    """Let every ConfigError of the block name the file that a configuration came from; None: from none."""
    try:
        yield
    except ConfigError as error:
        if file is None or error.path.startswith(str(file)):
            raise
        raise ConfigError(f"{file}: {error.path}", error.problem, error.allowed) from None
