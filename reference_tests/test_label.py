"""The label page: what comes next, what is kept whatever happens, who is refused, and a browser that labels."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minialign.engine.commands import run_command
from minialign.feedback import FeedbackStore, StoreError
from minialign.files import InputError
from minialign.label import __main__ as label
from minialign.label import server as page_server
from minialign.label.book import LabelBook, Refused
from minialign.label.comparison import ComparisonBook, compared, match
from minialign.label.queue import Queue
from minialign.label.server import Server

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-some-length"


def make_run(folder: Path, prompts: dict[str, int], first_seed: int = 0, color: int = 0) -> Path:
    """A run with so many small images of each prompt, in turns, so that a prompt's are not neighbours."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(max(prompts.values())):
        for prompt in (prompt for prompt, images in prompts.items() if number < images):
            name = f"images/{len(rows):03d}.png"
            Image.new("RGB", (16, 16), (color, 20 * number % 256, len(rows) % 256)).save(folder / name)
            rows.append((prompt, name, first_seed + len(rows)))
    store = FeedbackStore(folder)
    store.add_images(rows)
    store.close()
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", {"a cat": 3, "two dogs": 4, "a red cow": 5})


@contextmanager
def served(book: LabelBook, host: str = "127.0.0.1", **how):
    server = Server(book, host, 0, TOKEN, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        book.store.close()


def ask(port: int, path: str, body=None, method=None, **headers):
    """(status, JSON or bytes, headers) of one request, with the token; header names with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {
        key.replace("_", "-"): value for key, value in ({"Cookie": f"minialign-{port}={TOKEN}"} | headers).items()
    }
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        found = dict(answer.getheaders())
        return answer.status, json.loads(content) if "json" in found["Content-Type"] else content, found
    finally:
        connection.close()


def post(port: int, labeller: str, image: int, verdict: str | None):
    return ask(port, "/api/verdict", {"labeller": labeller, "image": image, "verdict": verdict})


def kept(folder: Path) -> dict[tuple[str, int], str]:
    database = sqlite3.connect(folder / "feedback.sqlite")
    rows = {
        (name, image): verdict
        for name, image, verdict in database.execute("SELECT labeller, image, verdict FROM labels")
    }
    database.close()
    return rows


# ------------------------------------------------------------------------------------------------- what comes next
def test_three_images_of_a_prompt_come_together_and_none_twice(run):
    book = LabelBook(FeedbackStore(run))
    prompts = {image.id: image.prompt for image in book.store.images()}
    seen, sizes = [], []
    while items := book.next("ann"):
        slots = items[0]["slots"]
        assert {prompts[slot["id"]] for slot in slots} == {items[0]["prompt"]}
        sizes.append(len(slots))
        for slot in slots:
            book.save("ann", slot["id"], "good")
            seen.append(slot["id"])
    assert sorted(seen) == list(range(1, 13)) and Counter(sizes) == {3: 3, 1: 1, 2: 1}
    assert book.progress("ann")["done"] == 12 == book.progress("bob")["total"] and book.progress("bob")["done"] == 0
    # of what two labellers have in hand, three items at once are three
    assert len({item["item"] for item in book.next("bob", (), 3)}) == 3
    first = book.next("bob")[0]["item"]
    assert book.next("bob")[0]["item"] == first != book.next("bob", [first])[0]["item"]
    book.store.close()


def test_the_least_labelled_come_first_whatever_happened_before():
    """Against the definition, by looking at every item."""
    pick = random.Random(0)
    group = np.array([pick.randrange(40) for _ in range(100)])
    group = np.unique(group, return_inverse=True)[1]
    queue = Queue(group, np.zeros(100, np.int64))
    judged = {name: set() for name in "abc"}
    for name in judged:
        queue.open(name, np.array([], int))
    for _ in range(600):
        name = pick.choice("abc")
        without = pick.sample(range(group.max() + 1), 3)
        item = queue.next(name, without)
        counts = np.array([sum(row in rows for rows in judged.values()) for row in range(100)])
        open_rows = [row for row in range(100) if row not in judged[name] and group[row] not in without]
        if not open_rows:
            assert item is None
        else:
            least = min(counts[open_rows])
            assert any(counts[row] == least for row in open_rows if group[row] == item)
        row = pick.randrange(100) if item is None else pick.choice([row for row in queue.rows(item)])
        if row in judged[name]:
            judged[name].remove(row)
            queue.add(name, row, -1)
        else:
            judged[name].add(row)
            queue.add(name, row, 1)
        assert queue.left(name) == 100 - len(judged[name])
    assert sum(map(len, judged.values())) > 100


def test_what_others_have_judged_comes_last(run):
    book = LabelBook(FeedbackStore(run))
    item = book.next("ann")[0]
    firsts = {book.next(str(i))[0]["item"] for i in range(20)}
    assert item["item"] in firsts
    for slot in item["slots"]:
        book.save("ann", slot["id"], "skip")
    assert item["item"] not in {book.next(str(i))[0]["item"] for i in range(20)}
    book.save("ann", item["slots"][0]["id"], None)
    assert {book.next(str(i))[0]["item"] for i in range(20)} == firsts
    book.store.close()


def test_labellers_begin_in_different_places():
    queue = Queue(np.arange(300) // 3, np.zeros(300, np.int64))
    firsts = set()
    for name in map(str, range(20)):
        queue.open(name, np.array([], int))
        firsts.add(queue.next(name, ()))
    assert len(firsts) > 15
    assert Queue(np.empty(0, int), np.empty(0, int)).size == 0


def test_images_and_labels_that_come_meanwhile(run):
    book, other = LabelBook(FeedbackStore(run)), FeedbackStore(run)
    first = book.next("ann")[0]
    other.add_labels("ann", [(slot["id"], "bad") for slot in first["slots"]])  # by another process
    assert book.next("ann")[0]["item"] != first["item"]
    shutil.copy(run / "images/000.png", run / "images/new.png")
    other.add_images([("a new prompt", "images/new.png", 99)])
    for _ in range(6):
        for slot in (items := book.next("ann"))[0]["slots"]:
            book.save("ann", slot["id"], "good")
        if items[0]["prompt"] == "a new prompt":
            break
    else:
        pytest.fail("the new image never came")
    other.close()
    book.store.close()


def test_back_and_undo(run):
    book = LabelBook(FeedbackStore(run))
    assert book.back("ann", "") is None
    done = []
    for _ in range(2):
        item = book.next("ann")[0]
        for slot in item["slots"]:
            book.save("ann", slot["id"], "good")
        done.append(item["item"])
    last = book.back("ann", "")
    assert last["item"] == done[1] and [slot["verdict"] for slot in last["slots"]] == ["good"] * len(last["slots"])
    first = book.back("ann", min(slot["time"] for slot in last["slots"]))
    assert first["item"] == done[0]
    assert book.back("ann", min(slot["time"] for slot in first["slots"])) is None and book.back("bob", "") is None
    image = first["slots"][0]["id"]
    before = book.progress("ann")["done"]
    assert book.save("ann", image, "bad")["progress"]["done"] == before  # changed, not added
    assert book.save("ann", image, None)["progress"]["done"] == before - 1  # taken back
    assert book.save("ann", image, None)["progress"]["done"] == before - 1  # nothing to take back
    assert ("ann", image) not in kept(run) and book.next("ann")[0]["item"] == done[0]
    book.store.close()


def test_the_last_verdict_is_the_latest_whatever_the_clock(run, tmp_path):
    other = make_run(tmp_path / "other", {"a cat": 3, "two dogs": 4, "a red cow": 5}, color=200)
    for book, verdict in ((LabelBook(FeedbackStore(run)), "good"), (ComparisonBook(FeedbackStore(run), other), "tie")):
        book.save("ann", 1, verdict)
        table = book.saved.table
        book.store.database.execute(f"UPDATE {table} SET time = '2099-12-31T23:59:59.999Z'")
        for image in (12, 4, 8):
            book.save("ann", image, verdict)
            assert image in [slot["id"] for slot in book.back("ann", "")["slots"]]
        book.save("bob", 1, verdict)
        times = dict(book.store.query(f"SELECT image, time FROM {table} WHERE labeller = 'ann'"))
        assert [times[image] for image in (12, 4, 8)] == [f"2100-01-01T00:00:00.00{i}Z" for i in range(3)]
        ((bobs,),) = book.store.query(f"SELECT time FROM {table} WHERE labeller = 'bob'")
        assert bobs < "2099" and bobs.endswith("Z") and len(bobs) == 24
        book.store.close()


def test_enough_labels_end_the_work(run):
    book = LabelBook(FeedbackStore(run), enough=2)
    book.store.add_labels("simulated annotator", [(image, "good") for image in range(1, 13)])  # does not count
    book.newest = -1  # as a new start
    for name in ("ann", "bob", "cy"):
        judged = 0
        while items := book.next(name):
            for slot in items[0]["slots"]:
                if judged < 9:
                    book.save(name, slot["id"], "good")
                    judged += 1
            if judged == 9:
                break
        assert book.progress(name)["done"] == judged
    counts = Counter(image for name, image in kept(run) if name != "simulated annotator")
    assert judged < 9 and set(counts.values()) == {2} and len(counts) == 12  # 9 + 9 + 6
    assert book.next("dan") == [] and book.finished("dan") and not LabelBook(book.store).finished("dan")
    assert book.progress("dan") == {"done": 0, "total": 0, "speed": None}
    book.save("ann", 1, None) if ("ann", 1) in kept(run) else book.save("bob", 1, None)
    assert book.next("dan")[0]["item"] and book.progress("dan")["total"] == 1
    book.store.close()


def test_agreement_is_told_at_the_end_alone(run):
    book = LabelBook(FeedbackStore(run))
    book.store.add_labels("bob", [(image, "good") for image in range(1, 13)])
    book.store.add_labels("ann", [(image, "bad") for image in range(1, 12)])
    assert [len(book.results(name)) for name in (None, "ann", "bob")] == [1, 1, 2]
    book.save("ann", 12, "bad")
    assert "kappa" in book.results("ann")[1] and "kappa" not in book.results("cy")[0]
    book.store.close()


def test_speed(run):
    book = LabelBook(FeedbackStore(run))
    assert book.progress("ann")["speed"] is None
    for image, second in enumerate((0, 6, 12, 4000, 4006), 1):  # a long break counts as a minute
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(second))
        book.store.database.execute("INSERT INTO labels VALUES (?, 'ann', 'good', ?, NULL)", (image, moment))
    assert book.progress("ann")["speed"] == pytest.approx(60 * 4 / (6 + 6 + 60 + 6), rel=1e-4)
    book.store.close()


# ----------------------------------------------------------------------------------------------------- what is kept
def label_all(port: int, labeller: str, verdict, acknowledged: list) -> None:
    try:
        while items := ask(port, f"/api/next?labeller={labeller}")[1]["items"]:
            for slot in items[0]["slots"]:
                if post(port, labeller, slot["id"], verdict(slot["id"]))[0] == 200:
                    acknowledged.append((labeller, slot["id"]))
    except (OSError, http.client.HTTPException):
        pass  # the server was killed


def test_two_labellers_at_once(run):
    lists = {"ann": [], "bob": []}
    with served(LabelBook(FeedbackStore(run))) as port:
        verdicts = {"ann": lambda i: "good", "bob": lambda i: ("good", "bad", "skip")[i % 3]}
        threads = [threading.Thread(target=label_all, args=(port, n, verdicts[n], lists[n])) for n in lists]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = ask(port, "/api/summary?labeller=bob")[1]["lines"]
    assert all(sorted(image for _, image in rows) == list(range(1, 13)) for rows in lists.values())
    assert kept(run) == {(name, i): verdicts[name](i) for name in lists for i in range(1, 13)}
    # Ann always says good: Bob agrees on a third, which is what chance would have
    assert lines == [
        "24 labels by 2 labellers on 12 of 12 images",
        "2 labellers agree on 33% of 12 images (Cohen's kappa: 0.00)",
    ]


@contextmanager
def process(folder: Path):
    """The command in a process of its own, and its port."""
    command = [sys.executable, "-m", "minialign.label", folder, "--port", "0", "--no-browser"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "MINIALIGN_TOKEN": TOKEN}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield started, int(re.search(r"127\.0\.0\.1:(\d+)/", started.stdout.readline())[1])
    finally:
        started.kill()
        started.communicate()


def test_a_full_disk_and_a_killed_server_lose_nothing_that_was_acknowledged(tmp_path):
    run = make_run(tmp_path / "run", {f"prompt {i}": 1 for i in range(3)})
    store = FeedbackStore(run)
    store.add_images((f"more {i // 3}", f"images/{i % 3:03d}.png", 1000 + i) for i in range(1500))
    store.close()
    acknowledged: list[tuple[str, int]] = []
    with process(run) as (started, port):
        size = (run / "feedback.sqlite").stat().st_size
        resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (size + 100_000, resource.RLIM_INFINITY))
        refused = None
        for image in range(1, 1500):
            status, told, _ = post(port, "ann", image, "good")
            if status != 200:
                refused = status, told["error"]
                break
            acknowledged.append(("ann", image))
        assert refused[0] == 507 and refused[1].startswith(
            "not saved: the disk is full or cannot be written; make room"
        )
        assert acknowledged and set(kept(run)) == set(acknowledged)
        resource.prlimit(started.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert post(port, "ann", image, "good")[0] == 200  # there is room again
        lists = {"bob": [], "cy": []}
        threads = [threading.Thread(target=label_all, args=(port, n, lambda i: "bad", lists[n])) for n in lists]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while sum(map(len, lists.values())) < 400 and time.monotonic() < deadline:
            time.sleep(0.001)
        started.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    done = {("ann", image), *acknowledged, *(row for rows in lists.values() for row in rows)}
    assert 400 <= len(done) - len(acknowledged) - 1 < 2 * 1503
    found = set(kept(run))
    assert done <= found and len(found - done) <= 2  # what was on its way, one a labeller
    database = sqlite3.connect(run / "feedback.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


def test_a_store_that_is_held_by_another(run, monkeypatch):
    book = LabelBook(FeedbackStore(run))
    book.store.database.execute("PRAGMA busy_timeout=50")
    holder = sqlite3.connect(run / "feedback.sqlite", isolation_level=None)
    with served(book) as port:
        holder.execute("BEGIN IMMEDIATE")
        assert post(port, "ann", 1, "good")[0] == 503
        holder.execute("ROLLBACK")
        assert post(port, "ann", 1, "good")[0] == 200
    holder.close()


def test_images_that_are_gone_or_others(run):
    with served(LabelBook(FeedbackStore(run))) as port:
        status, content, headers = ask(port, "/image/1")
        assert (status, headers["Content-Type"], content) == (200, "image/png", (run / "images/000.png").read_bytes())
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        (run / "images/000.png").unlink()
        assert ask(port, "/image/1")[:2] == (410, {"error": "the image is gone: images/000.png"})
        shutil.copy(run / "images/002.png", run / "images/001.png")
        assert ask(port, "/image/2")[0] == 409 and "SHA-256" in ask(port, "/image/2")[1]["error"]
        (run / "images/003.png").write_text("<script>")
        assert ask(port, "/image/4")[0] == 415
        (run / "images/004.png").unlink()
        (run / "images/004.png").mkdir()
        assert ask(port, "/image/5")[0] == 410
        assert post(port, "ann", 1, "skip")[0] == 200  # labelling goes on
        assert ask(port, "/image/3")[0] == 200


# -------------------------------------------------------------------------------------------------- who is refused
def test_nothing_outside_the_run_is_shown(run, tmp_path):
    secret = tmp_path / "elsewhere" / "secret.png"
    secret.parent.mkdir()
    Image.new("RGB", (4, 4)).save(secret)
    (run / "images/link.png").symlink_to(secret)
    names = ["../elsewhere/secret.png", str(secret), "images/../../elsewhere/secret.png", "images/link.png", "\x00"]
    store = FeedbackStore(run)
    for name in names:
        store.database.execute("INSERT INTO images (prompt, path) VALUES (1, ?)", (name,))
    with served(LabelBook(store)) as port:
        assert [ask(port, f"/image/{13 + i}")[0] for i in range(5)] == [403, 403, 403, 403, 415]
        for path in (
            "/../feedback.sqlite",
            "/feedback.sqlite",
            "//etc/passwd",
            "/image/../label.py",
            "/%2e%2e/x",
            "/image/99",
        ):
            assert ask(port, path)[0] == 404, path
    with served(LabelBook(FeedbackStore(run), [secret.parent])) as port:  # --image-folder
        assert [ask(port, f"/image/{13 + i}")[0] for i in range(4)] == [200] * 4


GOOD = {"labeller": "ann", "image": 1, "verdict": "good"}
REFUSED = [
    (403, "/", None, {"Host": "evil.example"}),
    (403, "/", None, {"Host": "evil.example:8765"}),
    (403, "/", None, {"Host": ""}),
    (403, "/", None, {"Host": "[::1"}),
    (403, "/", None, {"Host": "[::1]x"}),
    (403, "/", None, {"Host": "a@localhost"}),
    (403, "/api/verdict", GOOD, {"Origin": "http://evil.example"}),
    (403, "/api/verdict", GOOD, {"Origin": "null"}),
    (403, "/api/verdict", GOOD, {"Origin": "http://127.0.0.1:1"}),
    (415, "/api/verdict", GOOD, {"Content_Type": "text/plain"}),
    (415, "/api/verdict", GOOD, {"Content_Type": "application/x-www-form-urlencoded"}),
    (400, "/api/verdict", b"{", {}),
    (400, "/api/verdict", b"[" * 4000, {}),
    (400, "/api/verdict", b"\xff\xfe", {}),
    (400, "/api/verdict", [], {}),
    (400, "/api/verdict", {"labeller": "ann"}, {}),
    (400, "/api/verdict", GOOD | {"image": "1"}, {}),
    (400, "/api/verdict", GOOD | {"image": True}, {}),
    (400, "/api/verdict", GOOD | {"image": 1.0}, {}),
    (404, "/api/verdict", GOOD | {"image": 10**30}, {}),
    (404, "/api/verdict", GOOD | {"image": -1}, {}),
    (404, "/api/verdict", GOOD | {"image": 999}, {}),
    (400, "/api/verdict", GOOD | {"verdict": "fine"}, {}),
    (400, "/api/verdict", GOOD | {"verdict": 1}, {}),
    (400, "/api/verdict", GOOD | {"labeller": " "}, {}),
    (400, "/api/verdict", GOOD | {"labeller": "x" * 65}, {}),
    (400, "/api/verdict", GOOD | {"labeller": "a\x00b"}, {}),
    (400, "/api/verdict", GOOD | {"labeller": "\ud800"}, {}),
    (400, "/api/verdict", GOOD | {"labeller": None}, {}),
    (400, "/api/verdict", GOOD | {"labeller": "simulated annotator"}, {}),
    (413, "/api/verdict", b"x" * 4097, {}),
    (411, "/api/verdict", GOOD, {"Content_Length": "-1"}),
    (411, "/api/verdict", GOOD, {"Content_Length": "9" * 30}),
    (411, "/api/verdict", GOOD, {"Transfer_Encoding": "chunked", "Content_Length": "10"}),
    (404, "/api/other", GOOD, {}),
    (400, "/api/next", None, {}),
    (400, "/api/next?labeller=ann&without=1,x", None, {}),
    (400, "/api/next?labeller=ann&without=" + ",".join("1" * 51), None, {}),
    (404, "/api/next?labeller=ann&without=999", None, {}),
    (400, "/api/next?" + "&".join(f"a{i}=1" for i in range(99)), None, {}),
    (404, "/nowhere", None, {}),
    (400, "http://[/x", None, {"Host": "localhost"}),
    (400, "http://[/x", GOOD, {"Host": "localhost"}),
    (414, "/" + "x" * 70_000, None, {}),
    (501, "/", None, {"method": "DELETE"}),
]


def test_what_is_refused_says_so_in_one_line(run):
    with served(LabelBook(FeedbackStore(run))) as port:
        for status, path, body, how in REFUSED:
            found, told, headers = ask(port, path, body, **how)
            assert found == status, (path, body, how, told)
            assert set(told) == {"error"} and told["error"] and "\n" not in told["error"]
            assert "Traceback" not in told["error"] and headers["Connection"] == "close"
        assert not kept(run)
        same = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        assert ask(port, "/api/verdict", GOOD, **same)[0] == 200 and kept(run) == {("ann", 1): "good"}


def test_mistakes_of_the_server_are_told_to_its_terminal_alone(run, monkeypatch, capsys):
    book = LabelBook(FeedbackStore(run))
    monkeypatch.setattr(book, "results", lambda labeller: 1 / 0)
    with served(book) as port:
        status, told, _ = ask(port, "/api/summary")
        assert status == 500 and "division" not in told["error"] and "ZeroDivisionError" in capsys.readouterr().err


def raw(port: int, text: str) -> tuple[int, bytes]:
    """(status of the first answer, all bytes) of what is sent as it is; 0 where nothing is answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
    return int(found.split()[1]) if found else 0, found


def test_the_token_is_needed_and_kept_in_a_cookie(run):
    with served(LabelBook(FeedbackStore(run)), "0.0.0.0") as port:
        own = {"Host": f"192.0.2.7:{port}", "Cookie": "a=b"}  # any address may be this machine's; a name may not
        for path in (
            "/",
            "/image/1",
            "/api/setup",
            "/label.js",
            f"/?token={TOKEN}x",
            "/?token=",
            "/?once=",
            "/?once=x",
        ):
            assert ask(port, path, **own)[0] == 401
        assert ask(port, "/api/verdict", GOOD, **own)[0] == 401
        assert ask(port, f"/?token={TOKEN}", Host="evil.example")[0] == 403
        status, _, headers = ask(port, f"/?token={TOKEN}", **own)
        assert (status, headers["Location"]) == (303, "./") and "HttpOnly; SameSite=Lax" in headers["Set-Cookie"]
        cookie = own | {"Cookie": headers["Set-Cookie"].split(";")[0]}
        assert ask(port, "/", **cookie)[0] == 200
        assert ask(port, "/api/verdict", GOOD, **cookie)[0] == 200
        assert ask(port, "/api/verdict", GOOD, Origin="http://evil.example", **cookie)[0] == 403
        # a person who opens the address without the token reads what to do
        status, page, headers = ask(port, "/", Accept="text/html,*/*", **own)
        assert status == 401 and headers["Content-Type"].startswith("text/html")
        assert (
            b"open the complete address, with ?token=, that the server printed in its terminal" in page
            and b"<script" not in page
        )


def test_the_code_that_the_browser_is_opened_with_works_once(run):
    server = Server(LabelBook(FeedbackStore(run)), "127.0.0.1", 0, TOKEN)
    port, once = server.server_port, server.once
    assert TOKEN in server.address("token", TOKEN) and TOKEN not in server.address("once", once)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert ask(port, f"/api/setup?once={once}", Cookie="")[0] == 401  # for the page alone
        status, _, headers = ask(port, f"/?once={once}", Cookie="")
        assert status == 303 and f"={TOKEN};" in headers["Set-Cookie"]
        assert ask(port, f"/?once={once}", Cookie="")[0] == 401
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.book.store.close()


def test_the_token_is_given_by_environment_or_file_or_made(run, tmp_path, monkeypatch):
    monkeypatch.delenv("MINIALIGN_TOKEN", raising=False)
    assert len(label.given_token(None)) >= 32 and label.given_token(None) != label.given_token(None)
    monkeypatch.setenv("MINIALIGN_TOKEN", TOKEN)
    assert label.given_token(None) == TOKEN
    (tmp_path / "token").write_text(f"{TOKEN[::-1]}\nmore\n")
    assert label.given_token(tmp_path / "token") == TOKEN[::-1]
    monkeypatch.setenv("MINIALIGN_TOKEN", "short")
    with pytest.raises(InputError, match="MINIALIGN_TOKEN: accepted: 16 to 128 letters"):
        label.given_token(None)


def test_one_request_is_one_request(run):
    with served(LabelBook(FeedbackStore(run))) as port:
        head = f"Host: localhost:{port}\r\nCookie: minialign-{port}={TOKEN}\r\n"
        body = json.dumps(GOOD)
        kind = "Content-Type: application/json\r\n"
        second = f"POST /api/verdict HTTP/1.1\r\n{head}{kind}Content-Length: {len(body)}\r\n\r\n{body}"
        refused = (
            f"GET / HTTP/1.1\r\n{head}Content-Length: {len(second)}\r\n\r\n{second}",
            f"HEAD / HTTP/1.1\r\n{head}Content-Length: {len(second)}\r\n\r\n{second}",
            f"GET / HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{second}",
            f"GET / HTTP/1.1\r\n{head}Host: localhost\r\n\r\n",
            second.replace("Content-Length", "Content-Length: 2\r\nContent-Length"),
        )
        for text in refused:
            status, found = raw(port, text)
            assert status == 400 and found.count(b"HTTP/1.1 ") == 1, text
        assert raw(port, second[:-1])[0] == 0  # ends before its body does
        assert not kept(run) and raw(port, second)[0] == 200
        status, found = raw(port, f"HEAD / HTTP/1.1\r\n{head}\r\n")
        size = (page_server.PAGE / "label.html").stat().st_size
        assert status == 200 and f"Content-Length: {size}\r\n".encode() in found and found.endswith(b"\r\n\r\n")


def test_many_and_slow_clients_leave_room_for_others(run, monkeypatch):
    monkeypatch.setattr(page_server, "CONNECTIONS", 6)
    before = threading.active_count()
    with served(LabelBook(FeedbackStore(run))) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for connection in slow:
            connection.sendall(b"POST /api/verdict HTTP/1.1\r\nHost: x\r\n")
        assert post(port, "ann", 1, "good")[0] == 200
        deadline = time.monotonic() + 20
        while threading.active_count() > before + 1 + 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before + 1 + 6
        for connection in slow:
            connection.close()
        monkeypatch.setattr(page_server, "REQUEST_TIME", 0.2)  # in all, however often a byte comes
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
            with pytest.raises(OSError):
                while True:
                    connection.sendall(b"a")
                    time.sleep(0.01)
        assert post(port, "ann", 1, "bad")[0] == 200


def test_a_page_behind_a_proxy(run):
    with served(LabelBook(FeedbackStore(run))) as port:
        status, told, _ = ask(port, "/api/verdict", GOOD, Origin="https://labels.example.org")
        assert status == 403 and "https://labels.example.org" in told["error"] and "--origin" in told["error"]
    with served(LabelBook(FeedbackStore(run)), origin="https://labels.example.org/some/path") as port:
        for host in (f"127.0.0.1:{port}", "labels.example.org"):  # as the proxy has it
            for path in ("/api/verdict", "/some/path/api/verdict"):
                same = {"Host": host, "Origin": "https://labels.example.org"}
                assert ask(port, path, GOOD, **same)[0] == 200
        for origin in ("http://labels.example.org", "https://labels.example.org.evil", "https://evil.example"):
            assert ask(port, "/api/verdict", GOOD, Origin=origin)[0] == 403
        assert ask(port, "/some/path/")[0] == 200 == ask(port, "/some/path/image/1")[0] == ask(port, "/image/1")[0]
        assert ask(port, "/other/path/")[0] == 404
    page = (page_server.PAGE / "label.html").read_text() + (page_server.PAGE / "label.js").read_text()
    assert not re.search(r"""["'`]/(?!\W)""", page)  # addresses are below the page's own


def test_the_page_asks_nobody_else():
    for name in ("label.html", "label.css", "label.js"):
        assert "//" not in re.sub(r"^\s*//.*|(?<=\S) // .*", "", (page_server.PAGE / name).read_text(), flags=re.M), (
            name
        )
    assert "connect-src 'self'" in page_server.HEADERS["Content-Security-Policy"]
    assert "page/*" in (ROOT / "pyproject.toml").read_text()  # installed with the package


# ------------------------------------------------------------------------------------------------------ the command
def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["label", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(label.main)
    return ended.value.code, *capsys.readouterr()


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit):
        label.parse_arguments(["--help"])
    groups = dict(part.split(":\n", 1) for part in capsys.readouterr().out.split("\n\n")[2:] if ":\n" in part)
    told = {title: re.findall(r"^  (?:-h, )?(--[\w-]+)", lines, re.M) for title, lines in groups.items()}
    assert told["run"] == ["--help", "--out"]
    assert told["with --annotator"] == ["--seed", "--labels", "--redo"] and "hardware" not in told  # and no --device
    assert told["labelling"] == ["--labeller", "--guide", "--labels-per-image", "--image-folder"]
    assert told["comparison"] == ["--compare", "--sets"]
    assert told["server"] == ["--port", "--host", "--origin", "--token-file", "--no-browser"]
    assert told["in place of the page"] == ["--export", "--import", "--annotator", "--summary"]


def test_errors_of_the_command_are_one_line(run, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/feedback.sqlite").write_text("x" * 5000)
    short, long = tmp_path / "short", tmp_path / "long.md"
    short.write_text("short")
    long.write_text("x" * 70_000)
    for arguments, message in (
        ((empty,), "empty: no feedback.sqlite in it; accepted: a run's folder"),
        ((tmp_path / "broken",), "feedback.sqlite: cannot be used"),
        ((run, "--port", "70000"), "'70000'; accepted: a whole number from 0 to 65535"),
        ((run, "--token-file", tmp_path / "none"), "none: is not a file"),
        ((run, "--token-file", run / "feedback.sqlite"), "feedback.sqlite: cannot be read as text"),
        ((run, "--token-file", short), "short: accepted: 16 to 128 letters"),
        ((run, "--guide", tmp_path), "is not a file"),
        ((run, "--guide", long), "long.md: has more than 64 KiB"),
        ((run, "--origin", "labels.example.org"), "accepted: https://HOST or https://HOST/PATH"),
        ((run, "--origin", "https://a@b.example"), "accepted: https://HOST"),
        ((run, "--labels-per-image", "0"), "accepted: a whole number from 1 up"),
        ((run, "--labeller", "simulated annotator"), "accepted: a name of 1 to 64 characters, a person's"),
        ((run, "--labeller", " "), "accepted: a name of 1 to 64 characters"),
        ((run, "--compare", tmp_path / "none"), "--compare"),
        ((run, "--compare", empty), "its store holds no image of a prompt that is in"),
        ((run, "--image-folder", tmp_path / "none"), "not a folder"),
        ((run, "--images", tmp_path / "none"), "--image-folder"),  # its older name
        ((run, "--export", tmp_path / "labels.txt"), "accepted: a name that ends in .csv, .tsv or .jsonl"),
        ((run, "--import", tmp_path / "labels.csv"), "labels.csv: cannot be read"),
        ((run, "--export", "a.csv", "--summary"), "not allowed with"),
    ):
        code, out, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    with served(LabelBook(FeedbackStore(run))) as port:
        assert "cannot be listened on" in command(monkeypatch, capsys, run, "--port", port)[2]


def test_labels_go_out_and_in_by_command(run, tmp_path, monkeypatch, capsys):
    store = FeedbackStore(run)
    store.add_labels("ann", [(1, "good"), (2, "bad"), (3, "skip")])
    store.close()
    code, out, _ = command(monkeypatch, capsys, run, "--export", tmp_path / "labels.jsonl")
    assert code == 0 and out.endswith("labels.jsonl: 3 labels\n")
    code, out, _ = command(monkeypatch, capsys, tmp_path / "new", "--import", tmp_path / "labels.jsonl")
    assert code == 0 and "3 new labels" in out
    assert kept(tmp_path / "new") == {("ann", 1): "good", ("ann", 2): "bad", ("ann", 3): "skip"}
    code, out, _ = command(monkeypatch, capsys, run, "--summary")
    assert out == "3 labels by 1 labeller on 3 of 12 images\nNo image has labels by two labellers yet\n"


# ------------------------------------------------------------------------------------- images that another tool made
def own_folder(folder: Path, captions: dict[str, str]) -> Path:
    """Images with a caption beside each."""
    folder.mkdir()
    for i, (name, caption) in enumerate(captions.items()):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def begun(monkeypatch, capsys, *arguments):
    """Exit code, output, errors, and the book that would be served."""
    books = []

    def serve(store, args, roots):
        books.append(LabelBook(FeedbackStore(args.run), roots))

    monkeypatch.setattr(label, "serve", serve)
    return *command(monkeypatch, capsys, *arguments), books


def test_a_folder_of_images_with_captions_begins_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = own_folder(tmp_path / "photos", {"a": "a cat", "b": "a cat", "c": "a dog"})
    (source / "config.json").write_text('{"of": "another tool"}')
    before = sorted(path.name for path in source.iterdir())
    code, out, err, (book,) = begun(monkeypatch, capsys, "photos")
    assert code == 0 and out == "runs/photos: a run of the 3 images of photos, which stay where they are\n", err
    assert sorted(path.name for path in source.iterdir()) == before
    shown = [slot["id"] for item in book.next("ann", number=9) for slot in item["slots"]]
    assert len(shown) == 3 and all(book.picture(image, None)[0] == "image/png" for image in shown)
    book.save("ann", shown[0], "good")
    book.store.close()
    own_folder(tmp_path / "more", {"d": "a cow"})
    (tmp_path / "more" / "d.png").rename(source / "d.png"), (tmp_path / "more" / "d.txt").rename(source / "d.txt")
    code, _, _, (book,) = begun(monkeypatch, capsys, source)  # again: what is new is added, labels stay
    assert code == 0 and len(book.ids) == 4 and book.store.labels() == {shown[0]: 1.0}
    book.store.close()
    other = own_folder(tmp_path / "other", {"x": "a cat"})
    other.rename(tmp_path / "other.d"), (tmp_path / "sub").mkdir(), (tmp_path / "other.d").rename("sub/photos")
    code, _, err, _ = begun(monkeypatch, capsys, "sub/photos")  # of the same name
    assert (
        code == 2
        and err == "error: runs/photos: holds other images than sub/photos; accepted: --out RUN, another folder\n"
    )
    code, _, _, (book,) = begun(monkeypatch, capsys, "sub/photos", "--out", "mine")
    assert code == 0 and [image.prompt for image in FeedbackStore(tmp_path / "mine").images()] == ["a cat"]
    book.store.close()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_of_prompts_and_images_begins_a_run(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    own_folder(tmp_path / "photos", {"a": "a cat", "b": "a dog"})
    rows = [{"caption": "a cat", "file_name": "photos/a.png"}, {"caption": "a dog", "file_name": "photos/b.png"}]
    table = "".join(",".join(row) + "\n" for row in (rows[0], *(row.values() for row in rows)))
    (tmp_path / f"mine.{kind}").write_text(table if kind == "csv" else "\n".join(map(json.dumps, rows)))
    code, _, err, (book,) = begun(monkeypatch, capsys, f"mine.{kind}")
    assert code == 0 and book.store.folder == Path("runs/mine"), err
    images = book.store.images()
    assert [(image.prompt, image.path.name) for image in images] == [("a cat", "a.png"), ("a dog", "b.png")]
    assert book.picture(1, None)[0] == "image/png" and book.store.labels() == {}
    book.store.close()
    code, _, err, _ = begun(monkeypatch, capsys, "runs/two", "--import", f"mine.{kind}")  # where labels are asked for
    assert (
        code == 2 and "no column 'label'; columns needed: prompt, image, label" in err and not Path("runs/two").exists()
    )
    (tmp_path / "mine.json").write_text(json.dumps([row | {"label": one} for row, one in zip(rows, (1, None))]))
    code, _, _, (book,) = begun(monkeypatch, capsys, "mine.json", "--out", "both")  # some have a label
    assert code == 0 and len(book.ids) == 2 and book.store.labels() == {1: 1.0}
    book.store.close()


def test_images_that_no_run_can_be_begun_with_are_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = own_folder(tmp_path / "photos", {"a": "a cat", "b": "a dog"})
    Image.new("RGB", (32, 32)).save(source / "c.png")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    (tmp_path / "x.csv").write_text("prompt,image\na cat,photos/a.png\na dog,photos/nowhere.png\n")
    (tmp_path / "y.csv").write_text("what,image\na cat,photos/a.png\n")
    for arguments, message in (
        ((source,), "c.png: it has no caption; accepted: a caption for each image, in metadata.jsonl, metadata.csv"),
        (("y.csv",), "no column 'prompt'; columns needed: prompt, image; found: what, image; one of another name"),
        (("thesis",), "thesis: holds no images with captions"),
        (("x.csv",), "x.csv, line 3: image photos/nowhere.png does not exist"),
        (("x.csv", "--out", "thesis"), "thesis: holds files that are not a run's"),
        (("thesis", "--import", "x.csv"), "thesis: holds files that are not a run's"),
        ((run, "--out", "mine"), "--out and the flags for label files are accepted only with images to begin a run"),
        ((run, "--good-from", 3), "--out and the flags for label files are accepted only with images to begin a run"),
        ((run, "--import", "x.csv", "--out", "mine"), "--out: not used by --import; leave it out"),
        ((run, "--import", "x.csv", "--image-folder", tmp_path), "--image-folder: not used by --import; leave it out"),
        ((run, "--import", "x.csv", "--compare", tmp_path), "--compare: not used by --import; leave it out"),
        ((run, "--annotator", "--compare", tmp_path), "--compare: not used by --annotator; leave it out"),
        ((run, "--annotator", "--skip", "-1"), "a flag for label files: not used by --annotator; leave it out"),
        ((run, "--annotator", "--sets", 4), "--sets 4: accepted only with --compare OTHER"),
        ((run, "--labels", 5), "--labels: goes with --annotator, which is not given"),
        ((run, "--summary", "--seed", 5), "--seed: goes with --annotator, which is not given"),
        ((run, "--redo"), "--redo: goes with --annotator, which is not given"),
        (("nowhere",), "nowhere: no feedback.sqlite in it; accepted: a run's folder, or images to begin one"),
    ):
        code, _, err, books = begun(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and not books, err
        assert not Path("runs").exists() and not Path("mine").exists()
    (source / "c.txt").write_text("a cow")
    (source / "c.png").write_bytes(b"no image")
    assert "c.png: not an image" in begun(monkeypatch, capsys, source)[2] and not Path("runs").exists()


# ------------------------------------------------------------------------------------------------- blind comparison
def test_pairs_are_matched_by_prompt_and_seed_else_by_prompt(run, tmp_path):
    other = make_run(tmp_path / "other", {"two dogs": 2, "a cat": 2, "a horse": 2}, color=200)
    store = FeedbackStore(other)
    store.database.execute("UPDATE images SET seed = NULL WHERE prompt = 2")
    dogs = [image.path for image in store.images() if image.prompt == "two dogs"]
    here = FeedbackStore(run)
    mine = {image.path.name: image for image in here.images()}
    seeds = [mine["007.png"].seed, 12345]  # the first dog there was drawn from the seed of our third
    assert mine["007.png"].prompt == "two dogs"
    for path, seed in zip(dogs, seeds):
        store.database.execute("UPDATE images SET seed = ? WHERE path = ?", (seed, f"images/{path.name}"))
    store.close()
    pairs = match(here, other)
    named = {Path(here.images()[image - 1].file).name: Path(path).name for image, path in pairs.items()}
    assert named == {"007.png": dogs[0].name, "000.png": "001.png", "003.png": "004.png"}
    (other / "images/004.png").unlink()
    assert len(match(here, other)) == 2
    plain = tmp_path / "plain"
    shutil.copytree(other / "images", plain)
    assert {i: Path(path).name for i, path in match(here, plain).items()} == {
        1: "000.png",
        2: "001.png",
        3: "002.png",
        4: "003.png",
        6: "005.png",
    }
    here.close()


def test_a_comparison_is_blind_and_kept(tmp_path, monkeypatch, capsys):
    prompts = {f"prompt {i}": 2 for i in range(10)}
    run = make_run(tmp_path / "run", prompts)
    other = make_run(tmp_path / "other", prompts, color=200)
    book = ComparisonBook(FeedbackStore(run), other)
    assert book.results("ann") == [] and compared(run, other) == ["No comparison is decided yet; 0 ties"]
    ours = {(run / "images" / f"{i:03d}.png").read_bytes() for i in range(20)}
    sides, chosen = Counter(), {}
    with served(book) as port:
        while items := ask(port, "/api/next?labeller=ann")[1]["items"]:
            item = items[0]
            (slot,) = item["slots"]
            left, right = (ask(port, f"/{path}")[1] for path in slot["images"])
            assert (left in ours) != (right in ours)
            told = json.dumps(item)  # the same words whatever the side
            assert told == json.dumps(
                {
                    "item": slot["id"],
                    "prompt": item["prompt"],
                    "slots": [
                        {
                            "id": slot["id"],
                            "images": [f"image/{slot['id']}/left", f"image/{slot['id']}/right"],
                            "verdict": None,
                            "time": None,
                        }
                    ],
                }
            )
            side = "left" if left in ours else "right"
            sides[side] += 1
            number = len(chosen)
            verdict = "tie" if number < 4 else side if number < 16 else {"left": "right", "right": "left"}[side]
            assert post(port, "ann", slot["id"], verdict)[0] == 200
            chosen[slot["id"]] = ("tie" if number < 4 else "this" if number < 16 else "other", side)
        assert post(port, "ann", 1, "good")[0] == 400
        assert ask(port, "/image/1")[0] == 404
        last = ask(port, "/api/back?labeller=ann")[1]["item"]["slots"][0]
        assert last["verdict"] == {"left": "right", "right": "left"}[chosen[last["id"]][1]]
        (other / "images/000.png").unlink()
        assert 410 in (answers := {ask(port, f"/image/1/{side}")[0] for side in ("left", "right")}) and 200 in answers
        error = next(
            told for told in (ask(port, f"/image/1/{side}")[1] for side in ("left", "right")) if isinstance(told, dict)
        )
        assert error == {"error": "the image cannot be shown"}
    assert len(chosen) == 20 and min(sides["left"], sides["right"]) >= 4
    store = FeedbackStore(run)
    rows = store.database.execute("SELECT image, verdict, side, labeller, other FROM comparisons").fetchall()
    assert {i: (verdict, side) for i, verdict, side, *_ in rows} == chosen
    assert {row[3:] for row in rows} == {("ann", str(other))} and not kept(run)
    store.close()
    # 12 of 16 decided: Wilson's interval in closed form
    n, p, z = 16, 12 / 16, 1.96
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    _, out, _ = command(monkeypatch, capsys, run, "--compare", other, "--summary")
    assert (
        f"wins 75% of 16 decided comparisons with {other} (95 % interval {middle - half:.0%} to {middle + half:.0%})"
        in out
    )
    assert "12 won, 4 lost, 4 ties" in out
    command(monkeypatch, capsys, run, "--compare", other, "--export", tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and lines[0] == {
        "prompt": "prompt 0", "image": "run/images/000.png", "other": "other/images/000.png",
        "verdict": chosen[1][0], "side": chosen[1][1], "labeller": "ann", "time": lines[0]["time"], "seed": 0,
        "images": 1,
    }  # fmt: skip


def test_images_outside_both_runs_are_shown_in_a_comparison_where_their_folder_is_given(tmp_path):
    images, runs = tmp_path / "images", [tmp_path / name for name in ("one", "two")]
    for run in runs:
        path = images / f"{run.name}.png"
        for folder in (images, run):
            folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        store = FeedbackStore(run)
        store.add_images([("a cat", str(path), 1)])
        store.close()
    book = ComparisonBook(FeedbackStore(runs[0]), runs[1], roots=[images])
    assert [book.picture(1, side)[0] for side in ("left", "right")] == ["image/png"] * 2
    with pytest.raises(Refused):
        ComparisonBook(FeedbackStore(runs[0]), runs[1]).picture(1, "left")


def test_sets_are_compared_blind_and_won_by_two_thirds(tmp_path, monkeypatch, capsys):
    prompts = {"a cat": 5, "two dogs": 4, "a cow": 3}
    run, other = make_run(tmp_path / "run", prompts), make_run(tmp_path / "other", prompts, color=200)
    book = ComparisonBook(FeedbackStore(run), other, size=4)
    ours = {(run / "images" / f"{i:03d}.png").read_bytes() for i in range(12)}
    votes = {"ann": ("this", "this"), "bob": ("this", "other"), "cy": ("other", "tie")}
    with served(book) as port:
        for name, own in votes.items():
            told = ask(port, f"/api/next?labeller={name}")[1]
            assert told["progress"]["total"] == 2 and {one["prompt"] for one in told["items"]} == {"a cat", "two dogs"}
            for item in sorted(told["items"], key=lambda item: item["item"]):
                (slot,) = item["slots"]
                assert len(slot["images"]) == len(set(slot["images"])) == 8
                shown = [ask(port, f"/{place}")[1] in ours for place in slot["images"]]
                assert shown in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4)
                side, there = ("left", "right") if shown[0] else ("right", "left")
                verdict = {"this": side, "other": there, "tie": "tie"}[own[item["prompt"] == "two dogs"]]
                assert post(port, name, slot["id"], verdict)[0] == 200
        assert {book.side(image) for image in book.sets[1]} == {book.side(1)}
    code, out, _ = command(monkeypatch, capsys, run, "--compare", other, "--sets", 4, "--summary")
    assert code == 0 and "sets of 4 images of a prompt: 50% won, 50% tied, 0% lost of 2 sets\n6 votes" in out
    for size, nothing in ((1, "No comparison is decided yet"), (3, "No sets of 3 compared yet")):  # are counted apart
        _, out, _ = command(monkeypatch, capsys, run, "--compare", other, "--sets", size, "--summary")
        assert nothing in out
    command(monkeypatch, capsys, run, "--compare", other, "--export", tmp_path / "votes.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [4] * 6 and lines[0]["image"] == "run/images/000.png"
    for arguments, message in (
        ((run, "--sets", 4), "--sets 4: accepted only with --compare OTHER"),
        ((run, "--compare", other, "--sets", 6), "its store holds no 6 images of a prompt that is in"),
        ((run, "--compare", other, "--sets", 10), "--sets: '10'; accepted: a whole number from 1 to 9"),
    ):
        code, _, err = command(monkeypatch, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- a browser
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by selenium. MINIALIGN_BROWSER=required makes its absence a failure."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (chromium and driver and webdriver):
        names = {"selenium": webdriver, "chromium": chromium, "chromedriver": driver}
        reason = f"no browser to test in: {', '.join(name for name, found in names.items() if not found)} is not here"
        (pytest.fail if os.environ.get("MINIALIGN_BROWSER") == "required" else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,800",
    ):
        options.add_argument(flag)
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def wait(browser, script: str, *given) -> object:
    """What a script returns once it is true."""
    deadline = time.monotonic() + 20
    while not (found := browser.execute_script(script, *given)):
        assert time.monotonic() < deadline, (script, browser.execute_script("return document.body.innerText"))
        time.sleep(0.01)
    return found


IDLE = "return document.readyState === 'complete' && !moving && waiting === 0 && (item !== null || !$('end').hidden)"


def press(browser, *keys: str) -> None:
    for key in keys:
        wait(browser, IDLE)
        browser.switch_to.active_element.send_keys(key)
        time.sleep(0.02)
    wait(browser, IDLE)


def test_a_dozen_images_by_keyboard(browser, run):
    from selenium.webdriver.common.keys import Keys

    with served(LabelBook(FeedbackStore(run))) as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        wait(browser, "return !$('begin').hidden && document.activeElement.id === 'name'")
        browser.switch_to.active_element.send_keys("Ann ", Keys.ENTER)
        expected: dict[int, str] = {}
        pick = random.Random(0)

        def judge(number: int) -> None:
            for _ in range(number):
                wait(browser, IDLE)
                image = browser.execute_script("return slot().id")
                verdict = pick.choice(["good", "bad", "skip"])
                expected[image] = verdict
                press(browser, verdict[0])

        judge(5)
        assert {image: verdict for (_, image), verdict in kept(run).items()} == expected
        press(browser, "u")
        undone = browser.execute_script("return slot().id")
        del expected[undone]
        assert {image: verdict for (_, image), verdict in kept(run).items()} == expected
        browser.refresh()  # goes on where it was, without the name being asked for
        judge(3)
        press(browser, "z")
        assert browser.execute_script("return $('zoom').open && $('large').querySelector('img').naturalWidth === 16")
        press(browser, "z", "?")
        assert browser.execute_script("return $('keys').open")
        press(browser, Keys.ESCAPE)
        browser.refresh()
        press(browser, "u")  # after a reload the server's last one is undone
        del expected[browser.execute_script("return slot().id")]
        before = browser.execute_script("return item.item")
        press(browser, "p")
        assert browser.execute_script("return item.item") != before
        image = browser.execute_script("return slot().id")  # a changed mind, changed back
        other = "good" if expected[image] == "bad" else "bad"
        press(browser, other[0])
        assert kept(run)["Ann", image] == other
        press(browser, "u")
        assert kept(run)["Ann", image] == expected[image]
        press(browser, "n")
        assert browser.execute_script("return item.item") == before
        judge(12 - len(expected))
        wait(browser, "return !$('end').hidden && document.querySelectorAll('#summary li').length === 2")
        assert "All done, thank you" in browser.execute_script("return document.body.innerText")
        assert kept(run) == {("Ann", image): verdict for image, verdict in expected.items()} and len(expected) == 12
        severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        assert severe == []


@pytest.mark.slow
def test_what_the_page_says_where_something_is_wrong(browser, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", {"a cat": 3, "two dogs": 3})
    book = LabelBook(FeedbackStore(run))
    with served(book, labeller="Bob") as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        wait(browser, IDLE)
        first = browser.execute_script("return slot().id")
        add, calls, sent = book.store.add_labels, [], threading.Event()

        def full_once(*given):
            calls.append(given)
            if len(calls) > 1:
                return add(*given)
            sent.wait(20)  # the next keys come meanwhile
            raise StoreError(book.store.path, sqlite3.OperationalError("database or disk is full"))

        monkeypatch.setattr(book.store, "add_labels", full_once)
        for key in "ggg":  # the two behind the first must not hit other images
            browser.switch_to.active_element.send_keys(key)
        sent.set()
        told = wait(browser, "return waiting === 0 && !$('error').hidden && $('error').textContent")
        assert told.startswith("Not saved: the disk is full") and "\n" not in told
        assert browser.execute_script("return slot().id") == first
        assert not browser.execute_script("return document.querySelector('.mark')") and not kept(run)
        press(browser, "b")
        assert kept(run) == {("Bob", first): "bad"} and browser.execute_script("return $('error').hidden")
        for path in (run / "images").iterdir():
            path.unlink()
        browser.refresh()
        wait(browser, IDLE)
        assert "The image is gone" in wait(browser, "return $('cards').textContent")
        press(browser, "g")
        assert "skip it" in browser.execute_script("return $('error').textContent") and len(kept(run)) == 1
        press(browser, "s")
        assert len(kept(run)) == 2
        passed = set()
        for _ in range(5):  # what is passed over comes back
            passed.add(browser.execute_script("return item.item"))
            press(browser, "n")
        assert len(passed) == 2 and len(kept(run)) == 2


@pytest.mark.slow
def test_pairs_by_keyboard_and_on_a_phone(browser, run, tmp_path):
    from selenium.webdriver.common.keys import Keys

    other = make_run(tmp_path / "other", {"a cat": 3, "two dogs": 4, "a red cow": 5}, color=200)
    book = ComparisonBook(FeedbackStore(run), other)
    with served(book, labeller="Cy") as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        keys = {"left": Keys.ARROW_LEFT, "tie": Keys.ARROW_DOWN, "right": Keys.ARROW_RIGHT}
        shown = {}
        for i in range(6):
            wait(browser, IDLE)
            image, verdict = browser.execute_script("return slot().id"), list(keys)[i % 3]
            shown[image] = "tie" if verdict == "tie" else "this" if verdict == book.side(image) else "other"
            press(browser, keys[verdict])
        rows = book.store.database.execute("SELECT image, verdict FROM comparisons WHERE labeller = 'Cy'")
        assert dict(rows) == shown
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            browser.refresh()
            wait(browser, IDLE)
            assert browser.execute_script("return document.documentElement.scrollWidth <= 390")
            sizes = browser.execute_script(
                "return [...$('dock').children].map(b => b.getBoundingClientRect()).map(r => [r.height, r.bottom])"
            )
            assert all(height >= 44 and bottom <= 844 for height, bottom in sizes)  # a thumb reaches them
            browser.execute_script("$('dock').lastChild.click()")
            wait(browser, "return waiting === 0 && past.length === 1")
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_sets_stand_in_two_grids(browser, tmp_path):
    run, other = (
        make_run(tmp_path / name, {"a cat": 4, "two dogs": 4}, color) for name, color in (("a", 10), ("b", 200))
    )
    book = ComparisonBook(FeedbackStore(run), other, size=4)
    with served(book, labeller="Cy") as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        wait(browser, IDLE)
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('.card')].map((card) => [...card.querySelectorAll('img')]"
            ".map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.top, box.width, box.height]))"
        )
        assert [len(card) for card in boxes] == [4, 4]
        for card in boxes:  # two by two, none over another
            assert len({round(box[0]) for box in card}) == len({round(box[1]) for box in card}) == 2
            assert all(min(box[2:]) >= 60 for box in card)
        assert max(box[0] + box[2] for box in boxes[0]) < min(box[0] for box in boxes[1])
        press(browser, "z")
        assert browser.execute_script("return $('large').querySelectorAll('img').length") == 4
        press(browser, "l")
        wait(browser, IDLE)
        rows = book.store.query("SELECT verdict, other FROM comparisons")
        assert len(rows) == 1 and rows[0][1] == f"{other}//4"


SIZES = ((1280, 800), (1280, 640), (390, 844), (320, 568))
BOXES = """return ['prompt', innerWidth > 700 ? 'cards' : 'stage', 'cards', 'tools', 'dock']
           .map((id) => document.getElementById(id).getBoundingClientRect())
           .map((box) => [box.left, box.top, box.right, box.bottom])"""


@contextmanager
def sized(browser, width: int, height: int):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, 98, 115, 200, 2800])
@pytest.mark.parametrize("compare", [False, True])
def test_images_and_buttons_are_in_sight_whatever_the_prompt(browser, tmp_path, length, compare):
    prompt = ("a photo of a very detailed red circle on a wooden table, studio light, " * 40)[:length].strip()
    run, other = make_run(tmp_path / "run", {prompt: 3}), make_run(tmp_path / "other", {prompt: 3}, color=200)
    store = FeedbackStore(run)
    with served(ComparisonBook(store, other) if compare else LabelBook(store), labeller="Ann") as port:
        for width, height in SIZES:
            with sized(browser, width, height):
                browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
                wait(browser, IDLE)
                boxes = browser.execute_script(BOXES)
                for left, top, right, bottom in boxes:
                    assert 0 <= left < right <= width and 0 <= top < bottom <= height, (width, boxes)
                assert min(boxes[1][3] - boxes[1][1], boxes[1][2] - boxes[1][0]) >= 110  # large enough to judge
                above = sorted(boxes[:1] + boxes[1:], key=lambda box: box[1])
                assert all(a[3] <= b[1] + 1 or a == b for a, b in zip(above, above[1:])), (width, boxes)  # none covers
                shown = "const box = $('prompt'); box.scrollTop = 1e6; return [box.scrollTop > 0, box.textContent]"
                assert browser.execute_script(shown) == [length == 2800 or (length, width) == (200, 320), prompt]


@pytest.mark.slow
def test_the_first_page_shows_guide_name_and_button_at_once(browser, run):
    guide = "An image is good when everything that the prompt names is there.\n" * 40
    with served(LabelBook(FeedbackStore(run)), guide=guide) as port:
        for width, height in SIZES:
            with sized(browser, width, height):
                browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
                browser.execute_script("sessionStorage.clear()")
                browser.refresh()
                wait(browser, "return !$('begin').hidden")
                places = ["#begin .instructions", "#name", "#begin .main"]
                box = "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.top, b.bottom]"
                for top, bottom in (browser.execute_script(box, place) for place in places):
                    assert 0 <= top < bottom <= height, (width, places)


@pytest.mark.slow
def test_zoom_names_and_keyboards(browser, run, tmp_path):
    from selenium.webdriver.common.keys import Keys

    def key(letter: str, place: str) -> None:
        wait(browser, IDLE)
        for kind in ("keyDown", "keyUp"):
            how = {"type": kind, "key": letter, "code": place, "text": letter if kind == "keyDown" else ""}
            browser.execute_cdp_cmd("Input.dispatchKeyEvent", how)
        wait(browser, IDLE)

    other = make_run(tmp_path / "other", {"a cat": 3, "two dogs": 4, "a red cow": 5}, color=200)
    book = ComparisonBook(FeedbackStore(run), other)
    decided = lambda: book.store.query("SELECT COUNT(*) FROM comparisons")[0][0]  # noqa: E731
    with served(book, labeller="Cy") as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        press(browser, "z", Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
        assert browser.execute_script("return $('zoom').open && at") == 1 and decided() == 0  # arrows move
        press(browser, Keys.ARROW_LEFT)
        browser.execute_script("window.MOVED = []; new MutationObserver(() => MOVED.push($('large').textContent))"
                               ".observe($('large'), { childList: true })")  # fmt: skip
        press(browser, "l")
        assert "Left is better" in browser.execute_script("return MOVED") and decided() == 1
        assert browser.execute_script("return [...$('zoom-dock').children].map((b) => b.textContent)") == [
            "LeftL", "TieT", "RightR"
        ]  # the keys that give a verdict here  # fmt: skip
        browser.execute_script("$('zoom-dock').children[1].click()")
        wait(browser, IDLE)
        assert "Tie" in browser.execute_script("return MOVED") and decided() == 2
        press(browser, "z")
        assert browser.execute_script("return document.activeElement === $('cards').children[at].firstChild")
        browser.execute_script("$('who').click()")
        assert browser.execute_script("return !$('cancel').hidden && $('work').hidden")
        browser.execute_script("$('cancel').click()")
        assert browser.execute_script("return !$('work').hidden && labeller") == "Cy"
        assert ask(port, "/api/summary?labeller=Cy")[1] == {"lines": []}
    guide = "# Rules\n\n<b>Count</b> twice.\n"
    with served(LabelBook(FeedbackStore(run)), labeller="ann  of the hill", guide=guide) as port:
        browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
        wait(browser, "return typeof item !== 'undefined' && item && $('keys').open")  # the guide comes first
        assert guide.strip() in browser.execute_script("return $('keys').innerText")
        press(browser, Keys.ESCAPE)
        assert "kappa" not in browser.execute_script("return $('keys').textContent")
        key("\u043f", "KeyG")  # the key G of a Russian layout
        assert set(kept(run).values()) == {"good"} and len(kept(run)) == 1
        for _ in range(11):
            key("b", "KeyB")
        wait(browser, "return !$('end').hidden && document.querySelectorAll('#summary li').length === 2")
        assert browser.execute_script("return $('total').textContent").startswith(
            "ann  of the hill, you have labelled all 12 images."
        )


@pytest.mark.slow
def test_the_last_page_says_how_much_is_done(browser, tmp_path):
    for images, enough, said in (
        (1, None, "you have labelled the only image."),
        (3, None, "you have labelled all 3 images."),
        (3, 1, "every image has 1 verdict now; you labelled 3 of them."),
    ):
        book = LabelBook(FeedbackStore(make_run(tmp_path / said, {"a cat": images})), enough=enough)
        with served(book, labeller="Ann") as port:
            browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
            press(browser, *"g" * images)
            wait(browser, "return !$('end').hidden")
            assert browser.execute_script("return $('total').textContent") == f"Ann, {said}"


@pytest.mark.slow
@pytest.mark.parametrize("token", [TOKEN, "a-new-token-of-some-length"])
def test_a_verdict_that_is_lost_is_sent_again_once(browser, run, token):
    server = Server(LabelBook(FeedbackStore(run)), "127.0.0.1", 0, TOKEN, labeller="Ann")
    port = server.server_port

    def started(server: Server) -> threading.Thread:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        return thread

    def stop(server: Server, thread: threading.Thread) -> None:
        server.shutdown()
        thread.join()
        for connection in list(server.connections):
            server.shutdown_request(connection)
        server.server_close()
        server.book.store.close()

    thread = started(server)
    browser.get(f"http://127.0.0.1:{port}/?token={TOKEN}")
    wait(browser, IDLE)
    image = browser.execute_script("return slot().id")
    stop(server, thread)
    browser.switch_to.active_element.send_keys("g")
    told = wait(browser, "return !$('error').hidden && $('error').textContent")
    assert told.endswith("open the address that it prints: your last verdict is then sent again.") and not kept(run)
    server = Server(LabelBook(FeedbackStore(run)), "127.0.0.1", port, token, labeller="Ann")
    calls, save = [], server.book.save
    server.book.save = lambda *given: calls.append(given) or save(*given)
    thread = started(server)
    if token != TOKEN:  # the page's cookie is refused until the new address is opened
        time.sleep(1.2)  # two polls
        assert calls == [] and browser.execute_script("return $('error').textContent") == told
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        browser.get(f"http://127.0.0.1:{port}/?token={token}")
        wait(browser, IDLE)
        browser.close()
        browser.switch_to.window(first)
    wait(browser, IDLE)
    assert kept(run) == {("Ann", image): "good"} and calls == [("Ann", image, "good")]
    assert browser.execute_script("return $('error').hidden && past.length === 1")
    stop(server, thread)
