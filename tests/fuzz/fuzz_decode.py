"""Coverage-guided fuzzing of all decoders; a standalone program, not collected by pytest.

    pip install atheris
    python tests/fuzz/fuzz_decode.py SECONDS [libFuzzer options]

It starts from the payloads of the captures and from both forms of the generic format. A finding is written to ``crash-*`` in
the working directory and ends the run with its traceback; give that file as a further argument to see it again. Python code is
instrumented; msgspec and protobuf are compiled: they are exercised, but not guided.
"""

from __future__ import annotations

import sys
from array import array
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # not in the dev extra: few platforms have it

with atheris.instrument_imports(include=["kvatlas.ingest.decode"]):
    from kvatlas.ingest.decode import load_decoder, peek_header
    from kvatlas.ingest.decode.generic import EventType, GenericEvent, encode_msgpack, encode_protobuf

from kvatlas.errors import DecodeError
from kvatlas.ingest.recording import read_frames
from kvatlas.types import BlockStored

DATA = Path(__file__).parents[1] / "data" / "vllm-0.32"
CORPUS = Path(__file__).parents[2] / "build" / "fuzz" / "decode"
"""Seeds, and what earlier runs found to reach new code; git ignores it."""
SEED_BYTES_MAX = 2048
"""Longer payloads are left out of the seeds: mutations of them spend their time in tokens."""

DECODERS = [load_decoder(name) for name in ("vllm", "sglang", "generic")]


def one_input(payload: bytes) -> None:
    """Fails on anything but a DecodeError, and on events that contradict themselves."""
    peek_header(payload)
    for decoder in DECODERS:
        try:
            decoded = decoder.decode(payload)
        except DecodeError:
            continue
        for batch in decoded.batches:
            for event in batch.events:
                if isinstance(event, BlockStored):
                    assert event.extras is None or len(event.extras) == len(event.hashes)
                    assert event.block_size_tokens is not None or not event.token_ids


def write_seeds(folder: Path) -> None:
    prefix = array("I", range(32))
    ours = [
        GenericEvent(
            type=kind, block_id="b", parent_block_id=1, prefix=prefix, block_size_tokens=16, to_tier="cpu", to_pod_id="p"
        )
        for kind in EventType
    ]
    seeds = {
        encode_msgpack(ours),
        encode_protobuf(ours),
        *(encode([event]) for event in ours for encode in (encode_msgpack, encode_protobuf)),
    }
    for path in DATA.glob("*.bin"):
        seeds.update(frame.payload for frame in read_frames(path) if len(frame.payload) <= SEED_BYTES_MAX)
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(sorted(seeds)):
        (folder / f"seed-{i}").write_bytes(seed)


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].isdigit():
        raise SystemExit(__doc__)
    options = [f"-max_total_time={sys.argv[1]}", "-rss_limit_mb=2048", "-timeout=20", *sys.argv[2:]]
    if all(option.startswith("-") for option in sys.argv[2:]):
        write_seeds(CORPUS)
        options.append(str(CORPUS))
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
