"""A page that shows runs: one file, nothing loaded from elsewhere."""

from kvatlas.sim.report.page import check, write

__all__ = ["check", "write"]
