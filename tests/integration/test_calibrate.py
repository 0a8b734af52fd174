"""``kvatlas calibrate`` against an embedded engine whose costs are known, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.spec_file import read_spec, spec_text

KVATLAS = (sys.executable, "-m", "kvatlas")
SPEC = EngineSpec(costs=EngineCosts(step_s=0.02, prefill_token_s=0.0005), gpu_blocks=300, block_size_tokens=32)


@contextmanager
def engine(spec: Path) -> Iterator[str]:
    command = [*KVATLAS, "engine", "--json", "--port", "0", "--spec", str(spec)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
        assert process.wait(60) == 0


def test_a_measured_engine_is_no_faster_than_it_is_and_is_written_to_a_file(tmp_path: Path) -> None:
    """This machine may be slow, and add any time to what is measured; it takes none away."""
    given, written = tmp_path / "given.yaml", tmp_path / "written.yaml"
    given.write_text(spec_text(SPEC))
    with engine(given) as url:
        command = [*KVATLAS, "calibrate", url, "--json", "--prompt-tokens", "512", "--batch", "2", "--repeats", "1"]
        done = subprocess.run([*command, "--out", str(written)], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sends 11 requests, 1,984 prompt tokens" in done.stderr
    spec = read_spec(written)
    assert (spec.gpu_blocks, spec.block_size_tokens) == (300, 32)
    times = [time["measured_s"] for time in json.loads(done.stdout)["times"]]
    costs = SPEC.costs
    assert len(times) == 4 + 4
    for length, time_s in zip((64, 128, 256, 512), times, strict=False):
        assert time_s > costs.step_s + length * costs.prefill_token_s
    assert min(times[4:]) > 0.5 * costs.step_s


def test_an_address_where_nobody_is_is_refused() -> None:
    done = subprocess.run(
        [*KVATLAS, "calibrate", "http://127.0.0.1:1"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 2
    assert "does not answer" in done.stderr
