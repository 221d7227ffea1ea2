"""The live page's files, read once from the package, and the headers that keep it to itself."""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import Response

PAGE = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class StaticFiles:
    """The files of `taper/web`, by name; small enough to be kept in memory."""

    def __init__(self) -> None:
        folder = files("taper") / "web"
        self._files = {
            item.name: item.read_bytes() for item in folder.iterdir() if _suffix(item.name) in TYPES
        }  # fmt: skip

    def response(self, name: str) -> Response:
        content = self._files.get(name)
        if content is None:
            return Response(status_code=404)
        return Response(content, media_type=TYPES[_suffix(name)], headers=HEADERS)


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2]
