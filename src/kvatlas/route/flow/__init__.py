"""Whether and when a request may be routed: saturation, queues, fairness. Pure: no clock, no waiting of its own."""
