"""What to do, where several checks say it."""

from __future__ import annotations

from collections.abc import Mapping

from kvatlas.types import StaleReason

EVENTS_CONFIG = (
    '--kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", '
    '"replay_endpoint": "tcp://*:5607", "topic": "kv@HOST:PORT@MODEL"}\''
)

SELF_DESCRIBING = (
    'let offload events carry tokens: "self_describing_kv_events": true in kv_connector_extra_config of the engine\'s '
    "--kv-transfer-config (vLLM 0.24 and newer); a placeholder only names a block, which an event before it must have explained"
)

STALE_REMEDIES: Mapping[StaleReason, str] = {
    StaleReason.GAP: "events were lost: name the engine's replay endpoint ({replay_setting}) to have them fetched",
    StaleReason.QUEUE_FULL: "frames come faster than they are applied: raise ingest.queueFrames, or run more services",
    StaleReason.DECODE_ERROR: (
        "an event could not be read, or its blocks were refused: see the log, the engine's decoder (zmq.engines[].decoder), "
        "and with keys.mode: engine the block size"
    ),
    StaleReason.DISCONNECTED: "the engine cannot be reached: check that it runs, and the network between",
    StaleReason.HISTORY_INCOMPLETE: (
        "events from before the connection are not known: name a replay endpoint ({replay_setting}), and raise buffer_steps in "
        "the engine's events config; a reset of its prefix cache heals it too"
    ),
    StaleReason.RESYNCING: "a replay is running: wait",
}
"""``{replay_setting}`` is the setting that names the replay endpoint: see :func:`stale_remedy`."""


def replay_setting(source: str) -> str:
    """Return the setting that names the replay endpoint of a stream's source.

    A source that connects to kvatlas (bind mode) is told as "tcp://*:5557 from 10.0.0.7", or by the bound address alone where
    the transport tells no peer: only tcp does.
    """
    binds = " from " in source or not source.startswith("tcp://")
    return "zmq.replayEndpoint" if binds else "zmq.engines[].replayEndpoint"


def stale_remedy(reason: StaleReason, source: str) -> str:
    """Return what to do about a stale stream."""
    return STALE_REMEDIES[reason].replace("{replay_setting}", replay_setting(source))
