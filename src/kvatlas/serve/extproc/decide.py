"""Asks the dispatcher where a request goes."""

from __future__ import annotations

from kvatlas.errors import RequestError, RouteError
from kvatlas.observe.logs import get_logger
from kvatlas.serve.extproc.stream import Ask
from kvatlas.serve.routing.dispatch import Dispatcher, Trip

_log = get_logger(__name__)


async def decide(dispatcher: Dispatcher, ask: Ask) -> Trip | Exception:
    """Return the request's trip, or why it goes nowhere."""
    try:
        if ask.body is None:
            return dispatcher.dispatch_bare(ask.path, ask.headers, ask.subset)
        return await dispatcher.dispatch(ask.path, ask.headers, ask.body, ask.subset)
    except (RequestError, RouteError) as error:
        return error
    except Exception as error:
        _log.exception("request not decided", path=ask.path)
        return error
