"""The page for people, at /: plain HTML, CSS and ES modules, as they lie in this folder. Nothing builds them.

index.html   the page's frame        page.css    its looks, light and dark
page.js      what happens when       view.js     the elements of an answer
race.js      the two distributions   live.js     percentiles from /metrics
docs.html    /docs                   docs.js     starts Swagger UI, whose files lie in the package fastapi_offline

The browser is told to run, load and connect to nothing but these files and this service.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.errors import NotFound

MEDIA_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, and answered with 304 unless the service has changed.
    "Cache-Control": "no-cache",
}

page = APIRouter(include_in_schema=False)


class File:
    def __init__(self, package: str, *path: str) -> None:
        name = path[-1]
        self._content = resources.files(package).joinpath(*path).read_bytes()
        tag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'
        self._headers = HEADERS | {"Content-Type": MEDIA_TYPES[name.rpartition(".")[2]], "ETag": tag}

    def response(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)


OURS = ("index.html", "page.css", "page.js", "view.js", "race.js", "live.js", "docs.html", "docs.js")
SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
FILES = {name: File(__name__, name) for name in OURS}
FILES |= {name: File("fastapi_offline", "static", name) for name in SWAGGER}


@page.get("/")
async def index(request: Request) -> Response:
    return FILES["index.html"].response(request)


@page.get("/docs")
async def docs(request: Request) -> Response:
    return FILES["docs.html"].response(request)


@page.get("/page/{name}")
async def file(request: Request, name: str) -> Response:
    if name not in FILES:
        raise NotFound("There is no such file of the page; it starts at /.")
    return FILES[name].response(request)
