"""How fast a real engine is: measured over its API, and fitted to the simulator's cost model."""
