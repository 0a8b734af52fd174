"""Checks of an installation and of a running fleet. Each says what was seen and what to do; none changes anything.

check.py         what a check says
installation.py  this Python, its packages and plugins, the core
tokens.py        where prompts become tokens: tokenizers, renderers, services
service.py       a running service, from its own answers
sample.py        what was heard of one engine
announced.py     blocks as an engine announced them, hashes whole
hashing.py       how an engine hashes, against the settings of keys
engine.py        one engine, from a sample of its events
"""

from kvatlas.doctor.check import Check, Outcome
from kvatlas.doctor.engine import EngineExpectations, check_engine
from kvatlas.doctor.hashing import ExpectedKeys
from kvatlas.doctor.installation import check_installation
from kvatlas.doctor.sample import EngineSample, sample_engines
from kvatlas.doctor.service import ServiceState, check_service
from kvatlas.doctor.tokens import check_tokens

__all__ = [
    "Check",
    "EngineExpectations",
    "EngineSample",
    "ExpectedKeys",
    "Outcome",
    "ServiceState",
    "check_engine",
    "check_installation",
    "check_service",
    "check_tokens",
    "sample_engines",
]
