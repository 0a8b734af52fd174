"""Measurements, never tests. ``python -m benchmarks`` lists them; ``python -m benchmarks NAME [--quick] [--json]`` runs one."""
