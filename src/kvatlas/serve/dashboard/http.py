"""The page's routes: three files that anybody may have, and the data."""

from __future__ import annotations

import hashlib
from importlib import resources

import msgspec
from fastapi import Request
from fastapi.responses import RedirectResponse, Response

from kvatlas.errors import RequestError
from kvatlas.serve.dashboard.history import HistoryShown
from kvatlas.serve.dashboard.sampler import Sampler
from kvatlas.serve.dashboard.state import EngineRow
from kvatlas.serve.faults import JSON
from kvatlas.serve.queries import known_parameters

ENGINES_SHOWN = 60
FIND_CHARS_MAX = 200
SINCE_MAX = 1 << 53

PAGE = "/dashboard"
FILES = {
    PAGE: ("dashboard.html", "text/html; charset=utf-8"),
    f"{PAGE}/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    f"{PAGE}/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}
"""By path: the file in the package, and what it is."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class DashboardAnswer(msgspec.Struct, frozen=True):
    """What the page asks for every two seconds."""

    fleet: msgspec.Raw
    """FleetShown, encoded once for everybody."""
    engines: tuple[EngineRow, ...]
    """Of all engines, or of those found, the most interesting."""
    engines_found: int
    history: HistoryShown


class DashboardRoutes:
    """One method a route. Docstrings are shown in the API's documentation."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        folder = resources.files("kvatlas.serve.dashboard") / "assets"
        self._files = {path: _File((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    async def home(self) -> Response:
        """Lead to the page."""
        return RedirectResponse(PAGE.removeprefix("/"), status_code=307)  # relative: there may be a proxy in front

    async def file(self, request: Request) -> Response:
        """Return one of the page's files."""
        found = self._files[request.url.path]
        headers = {**HEADERS, "ETag": found.tag}
        if request.headers.get("if-none-match") == found.tag:
            return Response(status_code=304, headers=headers)
        return Response(found.content, headers=headers, media_type=found.kind)

    async def dashboard(self, request: Request) -> Response:
        """Show the fleet now and its last half hour, as the page at /dashboard does. Bounded, whatever the fleet's size."""
        known_parameters(request.query_params, frozenset({"since", "find"}))
        since = _since(request.query_params.get("since", "0"))
        find = request.query_params.get("find", "")[:FIND_CHARS_MAX].casefold()
        sample = await self._sampler.sample()
        tag = f'"{sample.number}-{since}-{hashlib.blake2s(find.encode(), digest_size=6).hexdigest()}"'
        headers = {"ETag": tag, "Cache-Control": "no-store"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        found = [row for row in sample.rows if not find or find in row.name.casefold() or find in (row.model or "").casefold()]
        answer = DashboardAnswer(
            msgspec.Raw(sample.encoded), tuple(found[:ENGINES_SHOWN]), len(found), self._sampler.history(since)
        )
        return Response(msgspec.json.encode(answer), headers=headers, media_type=JSON)


class _File:
    def __init__(self, content: bytes, kind: str) -> None:
        self.content = content
        self.kind = kind
        self.tag = f'"{hashlib.blake2s(content, digest_size=12).hexdigest()}"'


def _since(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= SINCE_MAX):
        raise RequestError("since", f"{text!r:.40} is no step's number", "0, or the last answer's first + its steps")
    return int(text)
