"""What a client is told of a request that goes nowhere."""

from __future__ import annotations

import json

import pytest

from kvatlas.errors import ExpiredError, NoCachedPrefixError, NoEndpointError, RequestError, SaturatedError, StoppingError
from kvatlas.serve.routing.refusals import DROPPED_REASON, refusal


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NoEndpointError("nobody"), 503, "rejected-no-endpoints"),
        (SaturatedError("busy"), 429, "rejected-saturated"),
        (ExpiredError("late"), 429, "rejected-ttl-expired"),
        (StoppingError(), 503, "rejected-shutting-down"),
        (NoCachedPrefixError(), 412, None),
    ],
)
def test_a_request_that_goes_nowhere_has_its_status_and_llm_ds_reason(
    error: Exception, status: int, reason: str | None
) -> None:
    told = refusal(error)
    assert told.status == status
    assert dict(told.headers).get(DROPPED_REASON) == reason
    assert ("retry-after" in dict(told.headers)) == (status in (429, 503))
    assert json.loads(told.body)["error"]["message"] == str(error)


def test_a_bad_request_names_the_field_as_openai_does() -> None:
    told = refusal(RequestError("model", "is empty", "name the model"))
    assert told.status == 400
    assert json.loads(told.body) == {
        "error": {
            "message": "model: is empty; name the model",
            "type": "invalid_request_error",
            "param": "model",
            "code": 400,
        }
    }


def test_a_failure_inside_tells_nothing_of_itself() -> None:
    told = refusal(ValueError("secret"))
    assert told.status == 500
    assert b"secret" not in told.body
