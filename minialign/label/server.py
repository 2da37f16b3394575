"""The server of the label page, written with the standard library alone.

A browser needs the token, which a cookie keeps. The server answers only requests that name this machine (or --origin)
and come from its own page. A verdict is in the store and on the disk before the page marks it.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import json
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..feedback import LONGEST_NAME, SIMULATED, StoreError, clean_name
from .book import LabelBook, Refused

AHEAD = 3  # items that the page loads in advance
LARGEST_BODY = 4096  # bytes of a request
CONNECTIONS = 32  # open at once, a thread each; another one closes the connection that is idle longest
REQUEST_TIME = 60  # seconds that a request may take
PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("label.html", "text/html; charset=utf-8"),
    "/label.css": ("label.css", "text/css; charset=utf-8"),
    "/label.js": ("label.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",  # another page cannot show the images
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
NO_TOKEN = "this page needs its token: open the complete address, with ?token=, that the server printed in its terminal"
REFUSAL = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Label images</title><h1>Label images</h1><p>{}.</p></html>"""


class Server(ThreadingHTTPServer):
    """Serves a book to browsers that have the token.

    labeller: the labeller's name (None: the page asks for it); guide: instructions, shown as plain text; origin:
    another address of the page (scheme, host and path), such as https://example.org/label of a proxy.
    """

    daemon_threads = True
    request_queue_size = 128  # a browser tries a connection beyond these again after a second

    def __init__(
        self,
        book: LabelBook,
        host: str,
        port: int,
        token: str,
        *,
        labeller: str | None = None,
        guide: str = "",
        origin: str | None = None,
    ):
        self.book, self.host, self.token, self.labeller, self.guide = book, host, token, labeller, guide
        self.origin = None if origin is None else urlsplit(origin)
        self.prefix = self.origin.path.rstrip("/") if self.origin else ""
        self.once: str | None = secrets.token_urlsafe(24)
        self.connections: dict[
            socket.socket, tuple[bool, float]
        ] = {}  # whether it is being answered, and its time limit
        self.guard = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:  # HTTPServer's asks the name service, which can take seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def address(self, key: str, value: str) -> str:
        """The address to open; `key` is token, or once, whose value works once and so may be seen by other users."""
        host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/?{key}={value}"

    def is_named(self, host: str) -> bool:
        """Whether a Host header names this server: another site's name that points here (DNS rebinding) does not."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:[0-9]+)?", host.lower(), re.ASCII)
        if match is None:
            return False
        name = match[1].strip("[]").rstrip(".")
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()) or self.origin and host == self.origin.netloc:
            return True
        # on all interfaces: any address may be this machine's, and an address cannot be rebound
        return self.host in ("0.0.0.0", "::") and (is_address(name) or name == socket.gethostname().lower())

    def is_origin(self, origin: str, host: str) -> bool:
        own = [f"http://{host}", f"https://{host}"]
        return origin in own or bool(self.origin and origin == f"{self.origin.scheme}://{self.origin.netloc}")

    def admits(self, once: str | None) -> bool:
        """Whether this is the code that the opened browser exchanges for the cookie; it works once."""
        with self.guard:
            right = bool(once and self.once and hmac.compare_digest(once.encode(), self.once.encode()))
            if right:
                self.once = None
        return right

    # ------------------------------------------------------------------------------- bounded threads, bounded time
    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no file descriptor is free
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.guard:
            if len(self.connections) >= CONNECTIONS:
                waiting = next((other for other, (answered, _) in self.connections.items() if not answered), None)
                if waiting is None:
                    return self.shutdown_request(request)
                self.cut(waiting)
            self.connections[request] = False, time.monotonic() + REQUEST_TIME
        super().process_request(request, client_address)

    def mark(self, request: socket.socket, answered: bool) -> None:
        """Note that a request is read now, or answered."""
        with self.guard:
            if self.connections.pop(request, None) is not None:  # to the end: the first is idle longest
                self.connections[request] = answered, time.monotonic() + REQUEST_TIME

    def service_actions(self) -> None:
        with self.guard:
            for request in [one for one, (_, last) in self.connections.items() if last < time.monotonic()]:
                self.cut(request)

    def cut(self, request: socket.socket) -> None:
        """Close a connection; its thread reads the end of the stream."""
        del self.connections[request]
        with suppress(OSError):  # it is closed already
            request.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        with self.guard:
            self.connections.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # a browser that went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection: the page, its images, else JSON; an error is {"error": one line}."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minialign", ""
    timeout = REQUEST_TIME

    def handle_one_request(self) -> None:
        self.server.mark(self.connection, answered=False)
        super().handle_one_request()

    def do_GET(self) -> None:
        self.answer(self.get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, method: Callable[[], None]) -> None:
        try:
            self.check()
            method()
        except Refused as error:
            self.refuse(error.status, str(error))
        except StoreError as error:
            status = {"full": 507, "busy": 503, "read-only": 507}.get(error.reason, 500)
            self.refuse(status, f"not saved: {str(error).removeprefix(f'{self.server.book.store.path}: ')}")
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()  # in the terminal, not in the answer
            self.refuse(500, "an error in the server, whose terminal says more")

    def check(self) -> None:
        """Refused unless this is exactly one request, to this server, from its page, with its token."""
        for header in ("Host", "Content-Length", "Transfer-Encoding", "Origin"):
            if len(self.headers.get_all(header, ())) > 1:
                raise Refused(400, f"{header} is given twice")
        if self.command != "POST" and (
            self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        ):
            raise Refused(400, f"{self.command} takes no body")  # it would be read as the next request
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        proxy = "behind a proxy, start the server with --origin and the address that the browser shows"
        if not self.server.is_named(host):
            raise Refused(403, f"this is not the server's address; open the one that it printed ({proxy})")
        if origin is not None and not self.server.is_origin(origin, host):
            raise Refused(403, f"a request from another site, {origin[:200]} ({proxy})")
        cookie = re.search(rf"(?:^|; ){self.cookie()}=([\w-]+)", self.headers.get("Cookie", ""))
        query = self.query()
        for given in (cookie and cookie[1], query.get("token")):
            if given and hmac.compare_digest(given.encode(), self.server.token.encode()):
                return
        if self.address() != "/" or self.command != "GET" or not self.server.admits(query.get("once")):
            raise Refused(401, NO_TOKEN)

    def cookie(self) -> str:
        return f"minialign-{self.server.server_port}"  # cookies know no ports

    def address(self) -> str:
        """The path of the request, without that of the proxy if it has it."""
        path, prefix = urlsplit(self.path).path, self.server.prefix
        return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path

    def query(self) -> dict[str, str]:
        try:
            return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query, max_num_fields=8).items()}
        except ValueError as error:
            raise Refused(400, "the query of the address cannot be read") from error

    def get(self) -> None:
        self.server.mark(self.connection, answered=True)
        query, path = self.query(), self.address()
        if path == "/" and query.keys() & {"token", "once"}:  # the cookie replaces it in the address bar
            kept = f"{self.cookie()}={self.server.token}; HttpOnly; SameSite=Lax; Path=/"
            return self.send(303, "text/plain", b"", {"Location": "./", "Set-Cookie": kept})
        if path in FILES:
            name, kind = FILES[path]
            return self.send(200, kind, (PAGE / name).read_bytes())
        if image := re.fullmatch(r"/image/([0-9]{1,18})(?:/(left|right))?", path):
            return self.send(200, *self.server.book.picture(int(image[1]), image[2]))
        if path.startswith("/api/"):
            return self.reply(self.api(path.removeprefix("/api/"), query))
        raise Refused(404, "no such page")

    def api(self, name: str, query: dict[str, str]) -> dict[str, Any]:
        book = self.server.book
        if name == "setup":
            with book.lock:
                names = [name for name in book.store.labellers() if name != SIMULATED]
            setup = {"mode": book.mode, "labeller": self.server.labeller, "guide": self.server.guide}
            return setup | {"enough": book.enough, "labellers": names[:100]}
        if name == "summary":
            return {"lines": book.results(self.name(query["labeller"]) if "labeller" in query else None)}
        if name == "next":
            labeller, keys = self.name(query.get("labeller")), query.get("without", "")
            if not re.fullmatch(r"([0-9]{1,18}(,[0-9]{1,18}){0,49})?", keys):
                raise Refused(400, "without: up to 50 numbers")
            items = book.next(labeller, [int(key) for key in keys.split(",") if key], AHEAD)
            return {"items": items, "progress": book.progress(labeller)}
        if name == "back":
            labeller, before = self.name(query.get("labeller")), query.get("before", "")
            return {"item": book.back(labeller, before), "progress": book.progress(labeller)}
        raise Refused(404, "no such page")

    def post(self) -> None:
        if self.address() != "/api/verdict":
            raise Refused(404, "no such page")
        if self.headers.get_content_type() != "application/json":  # a form of another site cannot send it
            raise Refused(415, "accepted: application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "Content-Length is needed")
        if int(length) > LARGEST_BODY:
            raise Refused(413, f"a request has at most {LARGEST_BODY} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the request ended before its body")
        self.server.mark(self.connection, answered=True)
        try:
            request = json.loads(body)
            labeller, image, verdict = (request[key] for key in ("labeller", "image", "verdict"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Refused(400, "accepted: {labeller, image, verdict} as JSON") from error
        if not isinstance(image, int) or isinstance(image, bool) or not isinstance(verdict, str | None):
            raise Refused(400, "accepted: a number for image, a word or null for verdict")
        if not 0 <= image < 2**63:
            raise Refused(404, "no such image")
        self.reply(self.server.book.save(self.name(labeller), image, verdict))

    def name(self, text: Any) -> str:
        name = clean_name(text) if isinstance(text, str) else None
        if name is None or name == SIMULATED:
            raise Refused(400, f"labeller: accepted: a person's name of 1 to {LONGEST_NAME} characters")
        return name

    def reply(self, value: dict[str, Any]) -> None:
        self.send(200, "application/json", json.dumps(value).encode())

    def refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the request's body may be unread
        kind, body = "application/json", json.dumps({"error": message})
        headers = getattr(self, "headers", None)  # None in a request that is too broken to have any
        if headers is not None and "text/html" in headers.get("Accept", ""):  # a person has opened this address
            kind, body = "text/html; charset=utf-8", REFUSAL.format(html.escape(message[0].upper() + message[1:]))
        self.send(status, kind, body.encode(), {"Connection": "close"})

    def send(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))} | (more or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # called by the standard library for broken requests
        self.refuse(code, message or "not a request that this server answers")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each image would hide the messages that matter."""


def is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False
