"""What is compared: kvatlas and other people's indexes, each in worker processes of its own, asked in turns."""

from benchmarks.sides.dynamo_install import NAME as DYNAMO
from benchmarks.sides.install import BaselineError
from benchmarks.sides.process import Placement, Worker, WorkerError, both, worker

__all__ = ["DYNAMO", "BaselineError", "Placement", "Worker", "WorkerError", "both", "worker"]
