"""The label store by its size, up to more than people reach: pytest -s bench/test_feedback.py

A million images of 100,000 prompts with three million labels by three people, one of whom is almost done; and less.
"""

import statistics
import time

import pytest
from test_scaling import keep

from minialign.feedback import FeedbackStore
from minialign.label.book import LabelBook

NUMBERS = "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {images})"
# spread over the file as people's labels are, not in the images' order: 700,001 is prime to the numbers of images
LABELS = """INSERT INTO labels (image, labeller, verdict, time) SELECT
            1 + i * 700001 % {images}, '{name}',
            CASE i * 7919 % 10 WHEN 0 THEN 'skip' WHEN 1 THEN 'bad' WHEN {odd} THEN 'bad' ELSE 'good' END,
            strftime('%Y-%m-%dT%H:%M:%fZ', 1.7e9 + i * 4, 'unixepoch') FROM n WHERE i < {images} - {left}"""
PEOPLE = {"ann": 1000, "bob": 0, "cy": 0}  # how many images each has left


def build(folder, images):
    """In one transaction, by SQL alone."""
    folder.mkdir()
    store = FeedbackStore(folder)
    numbers = NUMBERS.format(images=images)
    with store.transaction() as db:
        db.execute(f"{numbers} INSERT INTO prompts (text) SELECT 'prompt ' || i FROM n WHERE i < {images // 10}")
        row = "1 + i / 10, printf('images/%07d.png', i), i"
        db.execute(f"{numbers} INSERT INTO images (prompt, path, seed) SELECT {row} FROM n")
        for odd, (name, left) in enumerate(PEOPLE.items(), 3):
            db.execute(f"{numbers} {LABELS.format(images=images, name=name, odd=odd, left=left)}")
    store.close()


def timed(call, *given):
    begin = time.perf_counter()
    result = call(*given)
    return time.perf_counter() - begin, result


def measure(folder, images):
    opened, store = timed(FeedbackStore, folder)
    listed, rows = timed(store.images)
    counted, _ = timed(store.labels)
    soft, means = timed(store.labels, True)
    assert len(rows) == images and len(means) == 0.9 * images
    agreement, found = timed(store.agreement)
    assert found.images == images and found.labellers == 3
    served, desk = timed(LabelBook, store)
    first = [timed(desk.next, name)[0] for name in ("ann", "a new one")]
    following, saved = [], []
    for name in ("ann", "a new one") * 100:
        seconds, items = timed(desk.next, name)
        following.append(seconds)
        saved += [timed(desk.save, name, slot["id"], "good")[0] for slot in items[0]["slots"]]
    store.close()
    lines = {
        "open the training set": opened + listed + counted,
        "agreement of three": agreement,
        "begin to serve": served,
        "a verdict on disk": statistics.median(saved),
        "the next item": statistics.median(following),
    }
    times = lines | {
        "soft labels": soft,
        "a labeller's first item": max(first),
        "the slowest next item": max(following),
    }
    print(f"\n{images:,} images, {(folder / 'feedback.sqlite').stat().st_size / 2**20:.0f} MiB")
    for what, seconds in times.items():
        print(f"  {what:24}{1000 * seconds:10.2f} ms")
    return lines


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "million"
    build(folder, 1_000_000)
    return folder


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("name", ["ann", "a new one"])
def test_the_next_item_of_a_million_images(benchmark, million, name):
    """Each round a verdict ahead, so that there is another item; `ann` has labelled nearly all images."""
    benchmark.group = "the next item to label of a million images, three million labels"
    store = FeedbackStore(million)
    desk, items = LabelBook(store), []

    def judged():
        for slot in items[0]["slots"] if items else ():
            desk.save(name, slot["id"], "good")

    def following():
        items[:] = desk.next(name)

    following()
    benchmark.pedantic(following, setup=judged, rounds=100)
    store.close()
    assert len(items) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_store_with_three_labels_an_image(benchmark, tmp_path):
    points = {}
    for images in (10_000, 100_000, 1_000_000):
        build(tmp_path / str(images), images)
        points[images] = measure(tmp_path / str(images), images)
    keep(benchmark, "the store and the label page", "images in the store, three labels each", points)
    store = FeedbackStore(tmp_path / "100000")
    benchmark.pedantic(store.images, rounds=5)
    store.close()
