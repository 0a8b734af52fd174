"""What an event topic says: by convention ``kv@<pod-ip>:<port>@<model>``, in older engines ``kv@<pod>@<model>``."""

from __future__ import annotations

from kvatlas.types import PodId

_PARTS_WITH_MODEL = 3


def parse_topic(topic: str) -> tuple[PodId | None, str | None]:
    """Return (pod, model) as far as the topic names them. A model's name may hold ``@`` itself."""
    parts = topic.split("@", 2)
    if parts[0] != "kv" or len(parts) == 1:
        return None, None
    pod = PodId(parts[1]) if parts[1] else None
    model = parts[2] if len(parts) == _PARTS_WITH_MODEL and parts[2] else None
    return pod, model
