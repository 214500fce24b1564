"""``lora-engine demo --text --serve``: the search as a page, on the loopback interface alone.

A page of another site that a browser shows could reach a port of loopback too: so Host has to be
ours (a name that was rebound to 127.0.0.1 is not), what changes something is a POST of
application/json, which a foreign page cannot send without asking, and its Origin has to be ours.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rich.console import Console
from rich.progress import Progress

from lora_engine.errors import StoreLocked
from lora_engine.text_demo import reloaded, users
from lora_engine.text_demo.encoder import Encoder
from lora_engine.text_demo.session import Session

MOST_BYTES = 8192  # of a request's body
_SECONDS = 20.0  # that a connection may be silent
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves a session's page and requests on 127.0.0.1; ``session`` is set before it serves.
    Raises OSError naming the port where it is taken."""

    daemon_threads = True
    session: Session

    def __init__(self, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise OSError(error.errno, f"port {port}: {error.strerror}") from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for errors."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, of: Any) -> None:
        try:
            if self.headers.get("Host") not in self.server.hosts:
                raise _Refused(403, "Host: expected this page's")
            kind, body = of()
            self._send(200, kind, body)
        except _Refused as refused:
            self._send_json(refused.status, {"error": str(refused)})
        except (ValueError, TypeError) as error:
            self._send_json(400, {"error": str(error)})

    def _get(self) -> tuple[str, bytes]:
        url = urlsplit(self.path)
        if url.path == "/":
            return "text/html; charset=utf-8", _page()
        if url.path != "/state":
            raise _Refused(404, "expected / or /state")
        first = next(iter(self.server.session.world.wanted))
        user = parse_qs(url.query).get("user", [first])[0]
        return _json(self.server.session.state(user))

    def _post(self) -> tuple[str, bytes]:
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            raise _Refused(403, "Origin: expected this page's")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "Content-Type: expected application/json")
        asked, session = self._body(), self.server.session
        if self.path == "/search":
            return _json(session.search(_text(asked, "user"), _text(asked, "query")))
        if self.path == "/simulate":
            return _json(session.simulate(_text(asked, "user")))
        if self.path == "/click":
            passage = asked.get("passage")
            if type(passage) is not int:
                raise _Refused(400, "passage: expected a whole number")
            return _json(session.click(_text(asked, "user"), _text(asked, "query"), passage))
        raise _Refused(404, "expected /search, /click or /simulate")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(411, "Content-Length: expected a number")
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise _Refused(413, f"body: expected at most {MOST_BYTES} bytes")
        try:
            found = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(400, "body: expected JSON") from None
        if not isinstance(found, dict):
            raise _Refused(400, "body: expected an object")
        return found

    def _send_json(self, status: int, what: dict[str, Any]) -> None:
        self.close_connection = True
        self._send(status, *_json(what))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _page() -> bytes:
    return resources.files("lora_engine.text_demo").joinpath("page.html").read_bytes()


def _json(what: dict[str, Any]) -> tuple[str, bytes]:
    return "application/json", json.dumps(what).encode()


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise _Refused(400, f"{name}: expected text")
    return value


def run(port: int, out: str | os.PathLike[str] = "demo_output", most: int | None = None) -> int:
    """Encodes the first ``most`` passages, then serves until Ctrl-C; the exit status.

    The adapters are in the store ``served`` of ``out``, and there again the next time."""
    if not 0 <= port < 65536:
        print(f"demo: serve: expected a port, got {port}", file=sys.stderr)
        return 2
    encoder = Encoder()
    try:
        with (
            reloaded.open_store(Path(out) / "served", encoder.width) as store,
            Server(port) as server,  # what can be refused is, before the encoding
        ):
            server.session = Session(_encoded(encoder, most), encoder, store)
            print(f"{server.url} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print("\nstopped; what was learned is kept", flush=True)
    except (OSError, ValueError, StoreLocked) as error:  # the port, or the store
        print(f"demo: serve: {error}", file=sys.stderr)
        return 2
    return 0


def _encoded(encoder: Encoder, most: int | None) -> users.World:
    passages, queries = users.text(most)
    with Progress(console=Console(), transient=True) as progress:
        task = progress.add_task("encode", total=len(passages) + len(queries))
        return users.encoded(encoder, most, lambda more: progress.advance(task, more))
