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
    StaleReason.GAP: "events were lost: name the engine's replay endpoint (zmq.engines[].replayEndpoint) to have them fetched",
    StaleReason.QUEUE_FULL: "frames come faster than they are applied: raise ingest.queueFrames, or run more services",
    StaleReason.DECODE_ERROR: "an event could not be read: see the log, and the engine's decoder (zmq.engines[].decoder)",
    StaleReason.DISCONNECTED: "the engine cannot be reached: check that it runs, and the network between",
    StaleReason.HISTORY_INCOMPLETE: (
        "events from before the connection are not known: name a replay endpoint, and raise buffer_steps in the engine's "
        "events config; a reset of its prefix cache heals it too"
    ),
    StaleReason.RESYNCING: "a replay is running: wait",
}
