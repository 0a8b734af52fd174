"""Recorded events and requests, run through the index in the order of their time: predictions against the truth.

captures.py  capture files as one sequence of frames, each with its stream
requests.py  the requests that were sent meanwhile
follow.py    one stream's frames without a replay endpoint: duplicates, gaps, restarts
run.py       both applied to a fresh index; what was predicted, and a summary
"""

from kvatlas.backtest.captures import Captures
from kvatlas.backtest.requests import RecordedRequest, read_request, read_requests
from kvatlas.backtest.run import Backtest, Prediction, Summary

__all__ = ["Backtest", "Captures", "Prediction", "RecordedRequest", "Summary", "read_request", "read_requests"]
