"""Native engines do what the reference does, at the same times to the last bit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvatlas._native")

from kvatlas.sim.engines import Events
from kvatlas.sim.native import NativeEngines
from kvatlas.sim.reference import ReferenceEngines
from tests.models.engine_programs import Act, Driven, programs


@settings(deadline=None, max_examples=500)
@given(programs(), st.sampled_from(Events))
def test_native_engines_do_what_the_reference_does(program: list[Act], events: Events) -> None:
    reference, native = Driven(ReferenceEngines(), events), Driven(NativeEngines(), events)
    for act in program:
        assert native.do(act) == reference.do(act)
        for engine in reference.specs:
            assert native.engines.state(engine) == reference.engines.state(engine)
            assert native.engines.metrics(engine) == reference.engines.metrics(engine)
    reference.finish()
    native.finish()
    assert native.told == reference.told
    assert native.now_s == reference.now_s
