"""Stage 1 of the method: people label images in the browser: python -m minialign.label RUN

A labeller sees three images of one prompt and says good, bad or skip of each (Lee et al. 2023, section 3.1), by one
key an image. With --compare two pipelines' images of one prompt stand side by side, blind: which is better?

The page is plain HTML, CSS and JavaScript (page/), the server the standard library's. A verdict is in the store and
on the disk before the page marks it. The server listens on this machine alone unless --host and --token are given.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import ipaddress
import json
import os
import re
import socket
import socketserver
import sqlite3
import sys
import threading
import traceback
import webbrowser
import zlib
from collections.abc import Callable, Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from .command import Parser, in_range, run_command
from .evaluate import wilson_interval
from .feedback import (
    LONGEST_NAME,
    PREFERENCES,
    VERDICTS,
    FeedbackStore,
    StoredImage,
    clean_name,
    export_comparisons,
    export_labels,
    import_labels,
)
from .models.pretrained import InputError

TOGETHER = 3  # images of one prompt that are shown at once: the paper's
AHEAD = 3  # items that the page has in hand, so that the next is there at once
REMEMBERED = 32  # labellers whose order is kept in memory; another's is made anew when they come back
DONE = np.iinfo(np.int64).max
BODY, PICTURE = 4096, 64 * 2**20  # bytes of a request's body and of an image at most
PAUSE = 60  # seconds: a longer wait between two verdicts is not work
PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("label.html", "text/html; charset=utf-8"),
    "/label.css": ("label.css", "text/css; charset=utf-8"),
    "/label.js": ("label.js", "text/javascript; charset=utf-8"),
}
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",  # another page cannot show the images
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not answered as asked: an HTTP status and one line for the page."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------------------------------------- what comes next
class Queue:
    """The next item of each labeller: the one with the least labelled of the images that they have not judged.

    group (N,): the item of each of N rows (images), 0 to M-1; counts (N,): the labels that each has. Among equals items
    come in an order of the labeller's own, so that people who work at once seldom judge the same. The next one is the
    least of N numbers, whatever the order that labels came in.
    """

    def __init__(self, group: np.ndarray, counts: np.ndarray):
        self.group, self.counts = group, counts
        self.size = int(group.max()) + 1 if len(group) else 0
        self.order = np.argsort(group, kind="stable")
        self.starts = np.searchsorted(group[self.order], np.arange(self.size + 1))
        self.ranks: dict[str, np.ndarray] = {}
        self.keys: dict[str, np.ndarray] = {}

    def open(self, labeller: str, done: np.ndarray) -> None:
        """Begin with a labeller who has judged the rows `done`."""
        if len(self.keys) >= REMEMBERED:
            oldest = next(iter(self.keys))
            del self.keys[oldest], self.ranks[oldest]
        self.ranks[labeller] = np.random.default_rng(zlib.crc32(labeller.encode())).permutation(self.size)
        self.keys[labeller] = self.counts * self.size + self.ranks[labeller][self.group]
        self.keys[labeller][done] = DONE

    def add(self, labeller: str, row: int, change: int) -> None:
        """The labeller judged a row (change 1), took a verdict back (-1), or judged it elsewhere before (0)."""
        self.counts[row] += change
        for key in self.keys.values():
            if key[row] != DONE:
                key[row] += change * self.size
        again = self.counts[row] * self.size + self.ranks[labeller][self.group[row]]
        self.keys[labeller][row] = again if change < 0 else DONE

    def next(self, labeller: str, without: Collection[int]) -> int | None:
        """An item that is none of `without`; None where the labeller has judged all others."""
        key = self.keys[labeller]
        hidden = np.concatenate([self.rows(item) for item in without] or [np.empty(0, int)])
        kept, key[hidden] = key[hidden], DONE
        row = int(key.argmin()) if len(key) else 0
        found = int(self.group[row]) if len(key) and key[row] != DONE else None
        key[hidden] = kept
        return found

    def rows(self, item: int) -> np.ndarray:
        return self.order[self.starts[item] : self.starts[item + 1]]

    def left(self, labeller: str) -> int:
        """How many rows the labeller has not judged."""
        return int(np.count_nonzero(self.keys[labeller] != DONE))


class Desk:
    """What the page shows and saves: three images of a prompt, a verdict each. For many threads at once."""

    mode, verdicts, table = "label", VERDICTS, "labels"
    mine: str = "labeller = ?"  # a condition, and what it asks for besides the labeller
    asked: tuple[str, ...] = ()

    def __init__(self, store: FeedbackStore, roots: Sequence[Path] = ()):
        """roots: folders besides the run's that images may lie in."""
        self.store, self.lock = store, threading.RLock()
        self.roots = [root.resolve() for root in (store.folder, *roots)]
        self.newest: int | None = -1
        self.refresh()

    def refresh(self) -> None:
        """Take in images that were added to the store since."""
        with self.lock:
            newest = self.store.database.execute("SELECT MAX(id) FROM images").fetchone()[0]
            if newest != self.newest:
                self.ids, group = self.load()
                counts = np.zeros(len(self.ids), np.int64)
                query = f"SELECT image, COUNT(*) FROM {self.table} WHERE {self.scope()} GROUP BY image"
                images, numbers = self.columns(query, self.asked)
                rows, known = self.rows(images)
                counts[rows] = numbers[known]
                self.queue = Queue(group, counts)
                self.newest = newest

    def scope(self) -> str:
        return "1"

    def columns(self, query: str, given: Sequence[Any] = ()) -> np.ndarray:
        """The two columns of whole numbers that a query finds, (2,N)."""
        rows = self.store.database.execute(query, given)
        return np.fromiter((value for row in rows for value in row), np.int64).reshape(-1, 2).T

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Image ids in ascending order, and the item of each: TOGETHER images of a prompt in the order they came."""
        ids, prompts = self.columns("SELECT id, prompt FROM images ORDER BY id")
        order = np.argsort(prompts, kind="stable")
        same = prompts[order]
        place = np.arange(len(ids)) - np.searchsorted(same, same)  # of an image among its prompt's
        group = np.empty(len(ids), np.int64)
        group[order] = np.cumsum(place % TOGETHER == 0) - 1
        return ids, group

    def rows(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of those images that the desk has, and which those are (N,)."""
        rows = np.searchsorted(self.ids, images)
        known = rows < len(self.ids)
        known[known] = self.ids[rows[known]] == images[known]
        return rows[known], known

    def row(self, image: int) -> int:
        row = int(np.searchsorted(self.ids, image))
        if row == len(self.ids) or self.ids[row] != image:
            raise Refused(404, "no such image")
        return row

    def open(self, labeller: str) -> None:
        self.refresh()
        if labeller not in self.queue.keys:
            query = f"SELECT image, 0 FROM {self.table} WHERE {self.mine}"
            self.queue.open(labeller, self.rows(self.columns(query, (*self.asked, labeller))[0])[0])

    def next(self, labeller: str, without: Sequence[int] = (), number: int = 1) -> list[dict[str, Any]]:
        """Up to `number` items; `without` are keys of items that the page has already."""
        with self.lock:
            self.open(labeller)
            hidden = {int(self.queue.group[self.row(key)]) for key in without}
            found: list[dict[str, Any]] = []
            while len(found) < number and (item := self.queue.next(labeller, hidden)) is not None:
                hidden.add(item)
                shown = self.item(labeller, item)
                judged = [slot["id"] for slot in shown["slots"] if slot["verdict"] is not None]
                for image in judged:  # perhaps by another server: what is shown has something left to judge
                    self.queue.add(labeller, self.row(image), 0)
                if len(judged) < len(shown["slots"]):
                    found.append(shown)
            return found

    def back(self, labeller: str, before: str) -> dict[str, Any] | None:
        """The item that the labeller judged last before a time ("" is now), to look at and change."""
        with self.lock:
            self.open(labeller)
            query = f"SELECT image FROM {self.table} WHERE {self.mine} AND time < ? ORDER BY time DESC LIMIT 1"
            found = self.store.database.execute(query, (*self.asked, labeller, before or "9")).fetchone()
            rows = self.rows(np.array(found or (), np.int64))[0]
            return self.item(labeller, int(self.queue.group[rows[0]])) if len(rows) else None

    def judge(self, labeller: str, image: int, verdict: str | None) -> dict[str, Any]:
        """Save a verdict, or take it back (None); on the disk when this returns."""
        if verdict is not None and verdict not in self.verdicts:
            raise Refused(400, f"verdict {verdict!r}; accepted: {', '.join(self.verdicts)}")
        with self.lock:
            self.open(labeller)
            row = self.row(image)
            had = self.given(labeller, [image])
            if verdict is not None:
                self.write(labeller, image, verdict)
            elif had:
                with self.store.transaction() as db:
                    db.execute(
                        f"DELETE FROM {self.table} WHERE {self.mine} AND image = ?", (*self.asked, labeller, image)
                    )
            if bool(had) != (verdict is not None):
                self.queue.add(labeller, row, -1 if had else 1)
            time = self.given(labeller, [image]).get(image, (None, None))[1]
            return {"time": time, "progress": self.progress(labeller)}

    def write(self, labeller: str, image: int, verdict: str) -> None:
        self.store.add_labels(labeller, [(image, verdict)])

    def given(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Image id -> (verdict, time) of those that the labeller has judged."""
        marks = ", ".join("?" * len(images))
        query = f"SELECT image, verdict, time FROM {self.table} WHERE {self.mine} AND image IN ({marks})"
        rows = self.store.database.execute(query, (*self.asked, labeller, *images))
        return {image: (verdict, time) for image, verdict, time in rows}

    def item(self, labeller: str, item: int) -> dict[str, Any]:
        """An item as the page gets it; its key is its first image's id."""
        images = [int(image) for image in self.ids[self.queue.rows(item)]]
        given = self.given(labeller, images)
        query = "SELECT text FROM images JOIN prompts ON prompts.id = prompt WHERE images.id = ?"
        prompt = self.store.database.execute(query, (images[0],)).fetchone()[0]
        slots = [
            {"id": image, "images": self.addresses(image)}
            | dict(zip(("verdict", "time"), given.get(image, (None,) * 2)))
            for image in images
        ]
        return {"item": images[0], "prompt": prompt, "slots": slots}

    def addresses(self, image: int) -> list[str]:
        return [f"/image/{image}"]

    def progress(self, labeller: str) -> dict[str, Any]:
        """How many images the labeller has judged, of how many, and at what speed of late (a minute, or None)."""
        query = f"""SELECT julianday(time) * 86400 FROM {self.table} WHERE {self.mine} ORDER BY time DESC LIMIT 31"""
        with self.lock:
            self.open(labeller)
            times = [t for (t,) in self.store.database.execute(query, (*self.asked, labeller))]
            left = self.queue.left(labeller)
        worked = sum(min(b - a, PAUSE) for a, b in zip(times[1:], times))
        speed = 60 * (len(times) - 1) / worked if worked > 1 else None
        return {"done": len(self.ids) - left, "total": len(self.ids), "speed": speed}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        """Content type and bytes of an image. Refused unless it lies in a root and is what was drawn."""
        if side is not None:
            raise Refused(404, "no such image")
        with self.lock:
            query = "SELECT path, sha256 FROM images WHERE id = ?"
            found = self.store.database.execute(query, (image,)).fetchone()
        if found is None:
            raise Refused(404, "no such image")
        return self.read(*found)

    def read(self, name: str, sha256: str | None) -> tuple[str, bytes]:
        try:
            path = (self.store.folder / name).resolve()
            if not any(path.is_relative_to(root) for root in self.roots):
                raise Refused(403, f"the image lies outside the run: {name}; --images FOLDER lets it in")
            if not path.is_file():
                raise Refused(410, f"the image is gone: {name}")
            with open(path, "rb") as file:
                content = file.read(PICTURE + 1)
                file.seek(0)
                with Image.open(file, formats=list(FORMATS)) as opened:
                    kind = FORMATS[opened.format or ""]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Refused(415, f"not an image that can be shown (PNG, JPEG, WebP or GIF): {name}") from error
        if len(content) > PICTURE:
            raise Refused(413, f"the image has more than {PICTURE >> 20} MiB: {name}")
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(409, f"the image is not the one that was drawn, its SHA-256 differs: {name}")
        return kind, content

    def summary(self) -> list[str]:
        """What the store holds, in lines; read through a connection of its own, for it takes seconds of millions."""
        store = FeedbackStore(self.store.folder)
        try:
            count = "SELECT COUNT(*), COUNT(DISTINCT image) FROM labels"
            labels, images = store.database.execute(count).fetchone()
            total = store.database.execute("SELECT COUNT(*) FROM images").fetchone()[0]
            names = store.labellers()
            found = store.agreement()
        finally:
            store.close()
        return [
            f"{_number(labels, 'label')} by {_number(len(names), 'labeller')} "
            f"on {images:,} of {_number(total, 'image')}",
            "no image was judged by two labellers yet" if found is None else str(found),
        ]


class ComparingDesk(Desk):
    """What the page shows and saves with --compare: two images of a prompt, blind, the better one or a tie.

    An image of the run stands left or right by a hash of its id and the other folder, so it stands there again after a
    reload; the page and the addresses of the images do not say which is whose.
    """

    mode, verdicts, table = "compare", ("left", "right", "tie"), "comparisons"
    mine = "other = ? AND labeller = ?"

    def __init__(self, store: FeedbackStore, other: Path):
        self.other = other.resolve()
        self.asked = (str(self.other),)
        super().__init__(store, [self.other])

    def scope(self) -> str:
        return "other = ?"

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        self.pairs = match(self.store, self.other)
        ids = np.array(sorted(self.pairs), np.int64)
        return ids, np.arange(len(ids))

    def side(self, image: int) -> str:
        """Where the run's own image stands."""
        told = hashlib.sha256(f"{image}\0{self.other}".encode()).digest()
        return ("left", "right")[told[0] & 1]

    def addresses(self, image: int) -> list[str]:
        return [f"/image/{image}/left", f"/image/{image}/right"]

    def write(self, labeller: str, image: int, verdict: str) -> None:
        side = self.side(image)
        preference = "tie" if verdict == "tie" else "this" if verdict == side else "other"
        self.store.add_comparison(labeller, image, self.other, Path(self.pairs[image]), preference, side)

    def given(self, labeller: str, images: Sequence[int]) -> dict[int, tuple[str, str]]:
        def shown(image: int, preference: str) -> str:
            here = self.side(image)
            there = "right" if here == "left" else "left"
            return {"this": here, "other": there, "tie": "tie"}[preference]

        found = super().given(labeller, images)
        return {image: (shown(image, verdict), time) for image, (verdict, time) in found.items()}

    def picture(self, image: int, side: str | None) -> tuple[str, bytes]:
        if side is None or image not in self.pairs:
            raise Refused(404, "no such image")
        try:
            return super().picture(image, None) if side == self.side(image) else self.read(self.pairs[image], None)
        except Refused as error:
            raise Refused(error.status, "the image cannot be shown") from error  # its name would tell whose it is

    def summary(self) -> list[str]:
        with self.lock:
            query = "SELECT verdict, COUNT(*) FROM comparisons WHERE other = ? GROUP BY verdict"
            counts = dict.fromkeys(PREFERENCES, 0) | dict(self.store.database.execute(query, self.asked))
        wins, decided = counts["this"], counts["this"] + counts["other"]
        if not decided:
            return [f"nothing decided yet; {_number(counts['tie'], 'tie')}"]
        low, high = wilson_interval(wins, decided)
        return [
            f"{self.store.folder} wins {wins / decided:.0%} of {_number(decided, 'decided comparison')} "
            f"with {self.other} (95 % interval {low:.0%} to {high:.0%})",
            f"{wins:,} won, {counts['other']:,} lost, {_number(counts['tie'], 'tie')}",
        ]


def match(store: FeedbackStore, other: Path) -> dict[int, str]:
    """Image id of the run -> the other folder's image of the same prompt, as an absolute path.

    Where both are runs, prompt and seed decide; for a prompt of which no seed is in both, the order of its images. Of a
    folder without a store the file of the same name is the other image: its place below the run, or below its images/.
    Where a file is missing there is no pair.
    """
    here = store.images()
    if (other / "feedback.sqlite").exists():
        pairs = _match_runs(here, other)
    else:
        root, pairs = os.path.abspath(store.folder), {}
        for image in here:
            name = Path(os.path.relpath(os.path.abspath(image.file), root))
            names = [name, name.relative_to("images")] if name.parts[0] == "images" else [name]
            pairs[image.id] = next((str(other / name) for name in names if (other / name).is_file()), "")
    files = {image.id: image.file for image in here}
    return {i: path for i, path in pairs.items() if os.path.isfile(path) and os.path.isfile(files[i])}


def _match_runs(here: Sequence[StoredImage], other: Path) -> dict[int, str]:
    theirs = FeedbackStore(other)
    try:
        there = theirs.images()
    finally:
        theirs.close()
    drawn: dict[tuple[str, int | None], str] = {}
    prompts: dict[str, list[str]] = {}
    for image in there:
        path = os.path.abspath(image.file)
        prompts.setdefault(image.prompt, []).append(path)
        drawn.setdefault((image.prompt, image.seed), path)
    pairs = {i.id: drawn[i.prompt, i.seed] for i in here if i.seed is not None and (i.prompt, i.seed) in drawn}
    seeded = {image.prompt for image in here if image.id in pairs}
    for image in here:
        if image.prompt not in seeded and prompts.get(image.prompt):
            pairs[image.id] = prompts[image.prompt].pop(0)
    return pairs


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------- the server
class Server(ThreadingHTTPServer):
    """Serves a desk. Only requests that name this machine, come from its own page and carry the token are answered."""

    daemon_threads = True

    def __init__(self, desk: Desk, host: str, port: int, token: str | None = None, labeller: str | None = None):
        self.desk, self.host, self.token, self.labeller = desk, host, token, labeller
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:  # HTTPServer's asks the name service, which may take seconds
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def address(self) -> str:
        """What to open in the browser."""
        host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(self.host, self.host)
        query = "" if self.token is None else f"?token={self.token}"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/{query}"

    def is_named(self, host: str) -> bool:
        """Whether a Host header is this server's: a page that has its own name point here (DNS rebinding) is not."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in ("localhost", "127.0.0.1", "::1", self.host.lower()):
            return True
        # on all interfaces any address may be this machine's, but an address cannot be rebound
        return self.host in ("0.0.0.0", "::") and (_is_address(name) or name == socket.gethostname().lower())

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # a browser that went away
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. Answers are JSON but for the page and its images; errors are {"error": one line}."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minialign", ""
    timeout = 60

    def do_GET(self) -> None:
        self.answer(self.get)

    def do_POST(self) -> None:
        self.answer(self.post)

    def answer(self, method: Callable[[], None]) -> None:
        try:
            self.check()
            method()
        except Refused as error:
            self.refuse(error.status, str(error))
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text or "disk I/O" in text:
                self.refuse(507, "not saved: the disk is full or cannot be written; make room and judge again")
            elif "locked" in text:
                self.refuse(503, "not saved: another process is writing to the store; judge again")
            else:
                self.refuse(500, f"not saved: the store cannot be used ({text})")
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()  # here, not in the answer
            self.refuse(500, "the server made a mistake; its terminal says more")

    def check(self) -> None:
        """Refused unless the request is for this server, from its page, with its token."""
        if not self.server.is_named(self.headers.get("Host", "")):
            raise Refused(403, "this address is not the server's; open the one that it printed")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in (f"http://{self.headers['Host']}", f"https://{self.headers['Host']}"):
            raise Refused(403, "asked by another site")
        if self.server.token is not None:
            cookie = re.search(rf"(?:^|; ){self.cookie()}=([\w-]+)", self.headers.get("Cookie", ""))
            query = self.query()
            for given in (cookie and cookie[1], query.get("token")):
                if given and hmac.compare_digest(given.encode(), self.server.token.encode()):
                    return
            raise Refused(401, "no token; open the address that the server printed")

    def cookie(self) -> str:
        return f"minialign-{self.server.server_port}"  # cookies know no ports

    def query(self) -> dict[str, str]:
        try:
            return {key: values[-1] for key, values in parse_qs(urlsplit(self.path).query, max_num_fields=8).items()}
        except ValueError as error:
            raise Refused(400, "not an address that is read here") from error

    def get(self) -> None:
        query = self.query()
        path, desk = urlsplit(self.path).path, self.server.desk
        if path == "/" and "token" in query and self.server.token is not None:  # out of the address bar
            kept = f"{self.cookie()}={self.server.token}; HttpOnly; SameSite=Lax; Path=/"
            return self.send(303, "text/plain", b"", {"Location": "/", "Set-Cookie": kept})
        if path in FILES:
            name, kind = FILES[path]
            return self.send(200, kind, (PAGE / name).read_bytes())
        if found := re.fullmatch(r"/image/(\d{1,18})(?:/(left|right))?", path):
            return self.send(200, *desk.picture(int(found[1]), found[2]))
        if path == "/api/setup":
            with desk.lock:
                names = desk.store.labellers()
            told = {"mode": desk.mode, "run": desk.store.folder.resolve().name, "labeller": self.server.labeller}
            return self.reply(told | {"labellers": names[:100]})
        if path == "/api/summary":
            return self.reply({"lines": desk.summary()})
        if path == "/api/next":
            labeller, keys = self.name(query.get("labeller")), query.get("without", "")
            if not re.fullmatch(r"(\d{1,18}(,\d{1,18}){0,49})?", keys):
                raise Refused(400, "without: up to 50 numbers")
            items = desk.next(labeller, [int(key) for key in keys.split(",") if key], AHEAD)
            return self.reply({"items": items, "progress": desk.progress(labeller)})
        if path == "/api/back":
            labeller, before = self.name(query.get("labeller")), query.get("before", "")
            return self.reply({"item": desk.back(labeller, before), "progress": desk.progress(labeller)})
        raise Refused(404, "no such page")

    def post(self) -> None:
        if self.path != "/api/judge":
            raise Refused(404, "no such page")
        if self.headers.get_content_type() != "application/json":  # what a form of another site cannot send
            raise Refused(415, "accepted: application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refused(411, "Content-Length is needed")
        if int(length) > BODY:
            raise Refused(413, f"a request has at most {BODY} bytes")
        body = self.rfile.read(int(length))
        try:
            asked = json.loads(body)
            labeller, image, verdict = (asked[key] for key in ("labeller", "image", "verdict"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise Refused(400, "accepted: {labeller, image, verdict} as JSON") from error
        if not isinstance(image, int) or isinstance(image, bool) or not isinstance(verdict, str | None):
            raise Refused(400, "accepted: a number for image, a word or null for verdict")
        if not 0 <= image < 2**63:
            raise Refused(404, "no such image")
        self.reply(self.server.desk.judge(self.name(labeller), image, verdict))

    def name(self, text: Any) -> str:
        name = clean_name(text) if isinstance(text, str) else None
        if name is None:
            raise Refused(400, f"labeller: accepted: a name of 1 to {LONGEST_NAME} characters")
        return name

    def reply(self, value: dict[str, Any]) -> None:
        self.send(200, "application/json", json.dumps(value).encode())

    def refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the request's body may be unread
        self.send(status, "application/json", json.dumps({"error": message}).encode(), {"Connection": "close"})

    def send(self, status: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))} | (more or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.refuse(
            code, message or "not a request that is answered here"
        )  # the standard library's, of broken requests

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line a picture would bury what matters."""


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


# ------------------------------------------------------------------------------------------------------ the command
def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def token(text: str) -> str:
        if not re.fullmatch(r"[\w-]{16,128}", text, re.ASCII):
            raise argparse.ArgumentTypeError("accepted: 16 to 128 letters, digits, - and _, hard to guess")
        return text

    def name(text: str) -> str:
        if (clean := clean_name(text)) is None:
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: a name of 1 to {LONGEST_NAME} characters")
        return clean

    parser = Parser(prog="python -m minialign.label", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run's folder: feedback.sqlite and the images it names")
    add(
        "--compare",
        type=Path,
        metavar="OTHER",
        help="another run, or a folder of images of the same names: which is better?",
    )
    add("--labeller", type=name, help="who labels (default: the page asks)")
    add("--images", type=Path, help="a folder besides RUN that images may lie in")
    add("--port", type=in_range(int, 0, 65535), default=8765, help="0 is any free one (default: 8765)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than this machine's need --token (default: 127.0.0.1)",
    )
    add("--token", type=token, help="what the page's address must carry, 16 to 128 letters, digits, - and _")
    add("--no-browser", action="store_true", help="do not open the page")
    instead = parser.add_mutually_exclusive_group()
    files = "CSV or JSON lines by its name"
    instead.add_argument(
        "--export", type=Path, metavar="FILE", help=f"write labels (--compare: comparisons) to {files}"
    )
    instead.add_argument(
        "--import", type=Path, metavar="FILE", dest="take", help="take in labels, columns prompt, image, label"
    )
    instead.add_argument("--summary", action="store_true", help="say what there is and how far labellers agree")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if not is_loopback(args.host) and args.token is None:
        raise InputError(f"--host {args.host}: others could reach it, so --token is needed too; accepted: 127.0.0.1")
    if args.take is None and not (args.run / "feedback.sqlite").is_file():
        raise InputError(f"{args.run}: no feedback.sqlite in it; accepted: a run's folder (--import FILE begins one)")
    for flag, folder in (("--compare", args.compare), ("--images", args.images)):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{flag} {folder}: not a folder")
    if args.take is not None:
        args.run.mkdir(parents=True, exist_ok=True)
    store = FeedbackStore(args.run)
    try:
        if args.export is not None:
            number = (export_labels if args.compare is None else export_comparisons)(store, args.export)
            print(f"{args.export}: {_number(number, 'label' if args.compare is None else 'comparison')}")
        elif args.take is not None:
            print(f"{args.run}: {_number(import_labels(store, args.take), 'new label')} from {args.take}")
        else:
            serve(store, args)
    finally:
        store.close()


def serve(store: FeedbackStore, args: argparse.Namespace) -> None:
    """Serve the page until Ctrl+C; then say what there is."""
    desk = (
        Desk(store, [args.images] if args.images else [])
        if args.compare is None
        else ComparingDesk(store, args.compare)
    )
    if not len(desk.ids):
        what = "no images" if args.compare is None else f"no image of a prompt that is in {args.compare} too"
        raise InputError(f"{args.run}: its store holds {what}")
    if not args.summary:
        try:
            server = Server(desk, args.host, args.port, args.token, args.labeller)
        except OSError as error:
            where = f"--host {args.host} --port {args.port}"
            raise InputError(f"{where}: cannot be listened on ({error.strerror}); --port 0 takes a free one") from error
        items = _number(len(desk.ids), "image" if args.compare is None else "pair")
        print(f"{items} at {server.address}\nCtrl+C ends; every verdict is saved when the page marks it.", flush=True)
        if not args.no_browser:
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        with server:
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
    print("\n".join(desk.summary()))


if __name__ == "__main__":
    run_command(main)
