"""What models are compared on, what judges say of their images, and the command that compares."""

import itertools
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command
from PIL import Image, ImageChops

from minialign import CLIP, Pipeline, RewardModel
from minialign.engine.run import Run
from minialign.engine.settings import defaults
from minialign.evaluate import compare_models, test_items, write_results
from minialign.evaluate.__main__ import main
from minialign.evaluate.judges import (
    FEATURES,
    Judged,
    TestItem,
    distances,
    evaluate_model,
    reference_features,
    reference_images,
)
from minialign.evaluate.sets import clean, compared_sets, outcome_fractions, outcomes, rows_of_sets
from minialign.evaluate.tables import SAMPLES, best_of_curves, by_group, gains, picture, samples
from minialign.feedback import FeedbackStore
from minialign.files import InputError
from minialign.generate import noise_seed
from minialign.measures import PICTURE, cmmd, diversity, frechet_distance, paired_interval, wilson_interval
from minialign.models.pretrained import EMBEDDED
from minialign.models.reward import embed_images
from minialign.pages.cards import comparison
from minialign.prompts import CATEGORIES, PAPER, SHAPES, parse, split, spread
from minialign.shapes.world import drawings, knows, shown

test_items.__test__ = TestItem.__test__ = False  # pytest would collect them
CPU = torch.device("cpu")
SMALL = {"test_images": 9, "test_images_per_prompt": 3, "sampling_steps": 6, "guidance": 3.0}
TWO = {"test_images": 2, "test_images_per_prompt": None}
SEEN = [prompt.text for prompt in split(SHAPES).seen]
NAMES = ("seen", "new combinations", "new objects")
HELD_OUT = [prompt.text for part in split(SHAPES)[1:3] for prompt in part]


def run_of(folder: Path, texts: list[str], world: str = "shapes", **settings) -> Run:
    """A run as generate leaves it, with an image of each of the prompts."""
    run = Run(folder)
    (folder / "images").mkdir(parents=True)
    own = defaults(bundled=bool(world))
    run.remember({key: own[key] for key in ("model", "seed", "prompts", "images")} | settings, world=world)
    images = drawings(texts, 7) if knows(texts) else [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(len(texts))]
    store = FeedbackStore(folder)
    for i, image in enumerate(images):
        image.save(folder / "images" / f"{i:06d}.png")
    store.add_images((text, f"images/{i:06d}.png", i) for i, text in enumerate(texts))
    store.close()
    return run


def settings_of(run: Run, **more) -> dict:
    return run.resolve({"sampling_steps": 1, "guidance": 1.0} | more, bundled=bool(run.world))


# ------------------------------------------------------------------------------------------------ what is asked
def test_the_embedded_world_is_tested_on_its_groups_of_prompts_in_all_categories(tmp_path):
    run = run_of(tmp_path / "run", SEEN[:6], seed=0)
    items = test_items(run, settings_of(run, test_images=80))
    parts = {name: [p.text for p in part] for name, part in zip(NAMES, split(SHAPES)) if part}
    quota = 80 // len(parts)
    assert Counter(item.groups[1] for item in items) == dict.fromkeys(parts, quota)
    assert set(Counter(item.groups for item in items).values()) <= {quota // 4, quota // 4 + 1}
    assert {item.groups[0] for item in items} == set(CATEGORIES)
    assert all(item.prompt in parts[item.groups[1]] for item in items)
    assert all(parse(item.prompt, SHAPES).category in item.groups for item in items)
    assert [item.seed for item in items] == [noise_seed(0, i, test=True) for i in range(len(items))]
    # the order that runs have had so far: one generator for the prompts of the feedback and those of the test
    rng, kinds = random.Random(0), {name: [parse(text, SHAPES).category for text in parts[name]] for name in parts}
    spread(parts["seen"], kinds["seen"], 2560, rng)
    assert [item.prompt for item in items] == [
        text for name, part in parts.items() for text in spread(part, kinds[name], quota, rng)
    ]
    other = test_items(run_of(tmp_path / "1", SEEN[:0], seed=1), defaults(True) | {"seed": 1})
    assert not {item.seed for item in other} & {item.seed for item in items}


def test_several_images_of_a_prompt_start_from_noise_of_their_own(tmp_path):
    run = run_of(tmp_path / "run", SEEN[:6])
    items = test_items(run, settings_of(run, test_images=45, test_images_per_prompt=5))
    assert [item.prompt for item in items[::5] for _ in range(5)] == [item.prompt for item in items]
    assert len({item.prompt for item in items}) == 9 and len({item.seed for item in items}) == 45
    few = test_items(run, settings_of(run, test_images=2, test_images_per_prompt=3))
    names = [name for name, part in zip(NAMES, split(SHAPES)) if part]
    assert [item.groups[1] for item in few] == [name for name in names for _ in range(3)]


def test_another_seed_of_the_test_deals_no_prompt_out_again(tmp_path):
    """What is held out is what the run was begun with: a prompt with feedback stays a seen one."""
    run = run_of(tmp_path / "run", SEEN)
    items = test_items(run, settings_of(run, seed=5, test_images=80))
    assert all(item.prompt in (SEEN if "seen" in item.groups else HELD_OUT) for item in items)
    assert [item.seed for item in items] == [noise_seed(5, i, test=True) for i in range(len(items))]


def test_sets_are_whole(tmp_path):
    run = run_of(tmp_path / "run", SEEN[:6])
    items = test_items(run, settings_of(run, test_images=36, sets=4))
    assert len(items) == 36 and len(rows_of_sets(items, 4)) == 9
    assert all(len({items[i].prompt for i in rows}) == 1 for rows in rows_of_sets(items, 4))
    assert rows_of_sets(items_of("aabaab"), 2) == [[0, 1], [3, 4], [2, 5]] and rows_of_sets(items_of("aab"), 2) == [
        [0, 1]
    ]
    with pytest.raises(InputError, match="--test-images-per-prompt: 6; accepted with --sets 4: a multiple of it"):
        test_items(run, settings_of(run, sets=4, test_images_per_prompt=6))


def test_prompts_of_a_run_are_seen_and_those_that_its_grammar_holds_out_are_not(tmp_path):
    of_world = [prompt.text for prompt in split(SHAPES).others][:5]  # of the toy data set, with other feedback
    dogs = ["three dogs", "a green colored dog"]
    for number, (texts, world, unseen) in enumerate(
        [
            (of_world, "shapes", set(HELD_OUT)),
            (of_world, "", set(HELD_OUT)),
            (dogs, "", {prompt.text for part in split(PAPER)[1:3] for prompt in part}),
            ([*dogs, "a fox"], "", set()),
        ]
    ):
        run = run_of(tmp_path / str(number), texts, world)
        items = test_items(run, settings_of(run, test_images=24))
        known = [item.prompt for item in items if "seen" in item.groups]
        assert set(known) == set(texts), number
        assert {item.prompt for item in items} - set(known) <= unseen - set(texts), number
        assert len(known) == (8 if unseen else 24) and len(items) == 24
        if texts == dogs:  # of nothing else: all other objects are new to this run
            assert all((" dog" in item.prompt) != ("new objects" in item.groups) for item in items)
    assert Counter(item.groups for item in items)["seen",] == 8  # of three prompts in turn, one of no category


def test_prompts_of_a_file_are_seen_where_they_have_images(tmp_path):
    run, file = run_of(tmp_path / "run", SEEN[:6]), tmp_path / "mine.txt"
    known = SEEN[0]
    file.write_text(f"a fox\n{known}\nthree dogs\n")
    items = test_items(run, settings_of(run, test_images=6), file)
    groups = {item.prompt: item.groups for item in items}
    assert groups == {"a fox": ("unseen",), known: (parse(known, SHAPES).category, "seen"),
                      "three dogs": ("count", "new objects")}  # fmt: skip
    file.write_text("a fox\na ship\n")
    assert {item.groups for item in test_items(run, settings_of(run), file)} == {("unseen",)}
    with pytest.raises(InputError, match="no prompts to compare on; accepted: a run with images, or --prompts FILE"):
        test_items(Run(tmp_path), defaults(False))


# -------------------------------------------------------------------------------------------- what is answered
def side(name: str, **judged) -> Judged:
    values = {key.replace("_", " "): value for key, value in judged.items()}
    number = len(next(iter(values.values())))
    paths = [Path(f"{name}-{i}.png") for i in range(number)]
    return Judged(name, name, Path(), paths, torch.eye(number), values, [None] * number, None)


def items_of(texts: str, *groups: tuple[str, ...]) -> list[TestItem]:
    return [TestItem(text, i, groups[i % len(groups)] if groups else ()) for i, text in enumerate(texts)]


def test_groups_count_what_was_judged():
    items = items_of("aabb", *[("count", "seen")] * 2, *[("color", "seen")] * 2)
    sides = [
        side("A", people=[1.0, None, 0.0, 0.0]),
        side("B", people=[1.0, 1.0, 1.0, None]),
        side("C", reward=[0.5] * 4),
    ]
    table = by_group(sides, "people", items)
    assert set(table) == {"A", "B"} and set(table["A"]) == {"overall", "count", "seen", "color"}
    assert table["A"]["overall"] == {"value": pytest.approx(1 / 3), "n": 3, "ci95": wilson_interval(1, 3)}
    assert table["B"]["overall"]["gain"] == 0.5  # of the two that have both: 1 to 1, 0 to 1
    assert table["B"]["overall"]["gain_ci95"] == paired_interval([1, 0], [1, 1], ["a", "b"])
    assert table["B"]["color"]["value"] == 1.0 and table["B"]["color"]["n"] == 1
    numbers = by_group(sides, "reward", items)["C"]["count"]
    assert numbers["ci95"] == paired_interval([0, 0], [0.5, 0.5], ["a", "a"]) and "gain" not in numbers


def test_one_prompt_has_no_interval_and_none_leaves_its_range():
    sides = [side(name, people=[value] * 2, CLIP_score=[value] * 2) for name, value in (("A", 0.0), ("B", 1.0))]
    for judge in ("people", "CLIP score"):
        found = by_group(sides, judge, items_of("aa", ("seen",)))["B"]["overall"]
        assert found["gain"] == 1.0 and found["gain_ci95"] is None
    sides = [side("A", reward=[0.9, 0.8], CLIP_score=[0.9, 0.8]), side("B", reward=[0.1, 0.1], CLIP_score=[-1, 1.0])]
    for judge, least in (("reward", 0), ("CLIP score", -1)):
        table = by_group(sides, judge, items_of("ab", ("seen",)))
        assert table["A"]["overall"]["ci95"][1] == 1
        assert table["B"]["overall"]["ci95"][0] == (pytest.approx(0.1) if least == 0 else -1)
        assert table["B"]["overall"]["gain_ci95"][0] == least - 1


def test_curves_are_means_over_prompts_that_are_judged_whole():
    sides = [side("A", reward=[0.1, 0.9, 0.3, 0.2], people=[0.0, 1.0, 0.0, None], CLIP_score=[0.2, 0.1, 0.1, 0.2])]
    curves = best_of_curves(sides, items_of("aabb"))
    assert curves["reward"]["reward"]["A"]["value"] == pytest.approx([(0.5 + 0.25) / 2, (0.9 + 0.3) / 2])
    assert curves["reward"]["people"]["A"]["value"] == [0.5, 1.0]  # of a alone: of b one was not judged
    assert curves["CLIP score"]["people"]["A"]["value"] == [0.5, 0.0] and "CLIP score" not in curves["CLIP score"]
    means, names = [0.9, 0.3], ["0", "1"]
    assert curves["reward"]["reward"]["A"]["ci95"][1] == paired_interval([0, 0], means, names, (0, 1))
    alone = best_of_curves([side("A", CLIP_score=[0.2, 0.1])], items_of("aa"))
    assert alone["CLIP score"]["CLIP score"]["A"]["value"] == pytest.approx([0.15, 0.2])


def test_pictures_before_and_after_have_numbers_with_intervals_over_prompts(tmp_path):
    """Pale images of two prompts become full of color: the difference is of each image with its own earlier one."""
    items, sides, colors = items_of("aab"), [], {"A": [(90, 60, 60), (60, 60, 90), (8, 4, 2)], "B": [(200, 0, 0)] * 3}
    for name, shown_ in colors.items():
        one = side(name, reward=[0.5] * 3)
        for path, color in zip(one.paths, shown_):
            Image.new("RGB", (4, 4), color).save(tmp_path / path)
        sides.append(replace(one, paths=[tmp_path / path for path in one.paths]))
    found = picture(sides, items)
    assert found.keys() == PICTURE.keys() and all(list(table) == ["A", "B"] for table in found.values())
    before, after = [1 / 3, 1 / 3, 0.75], [1.0] * 3
    a, b = found["saturation"].values()
    assert a == {"value": pytest.approx(sum(before) / 3), "n": 3,
                 "ci95": pytest.approx(paired_interval([0.0] * 3, before, "aab", (0, 1)))}  # fmt: skip
    assert b["value"] == 1 and b["gain"] == pytest.approx(1 - sum(before) / 3)
    assert b["gain_ci95"] == pytest.approx(paired_interval(before, after, "aab"))
    assert found["brightness"]["B"]["value"] == pytest.approx(0.299 * 200 / 255)
    assert found["color entropy"]["B"] == {"value": 0, "n": 3, "ci95": [0, 0], "gain": 0, "gain_ci95": [0, 0]}


def test_raters_decide_on_sets_as_often_as_the_binomial_says():
    """Of sets of one image: a rater prefers ours with (1-e)^2, theirs with e^2; six of nine decide."""
    number, wrong = 20_000, 0.2
    ours, theirs = torch.ones(number, 1), torch.zeros(number, 1)
    found = outcome_fractions(outcomes(ours, theirs, 9, wrong, seed=0))

    def six_of_nine(p):
        return sum(math.comb(9, k) * p**k * (1 - p) ** (9 - k) for k in range(6, 10))

    for name, chance in (("won", six_of_nine(0.8**2)), ("lost", six_of_nine(0.2**2))):
        assert found[name] == pytest.approx(chance, abs=4 * math.sqrt(chance / number) + 1e-9)
    assert found["n"] == number and sum(found[name] for name in ("won", "tied", "lost")) == pytest.approx(1)
    three = (
        torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]),
        torch.tensor([[1.0, 0, 0, 0]] * 2 + [[1, 1, 1, 0]]),
    )
    assert outcomes(*three).tolist() == [1, 0, -1] and outcomes(*three, raters=9).tolist() == [1, 0, -1]
    assert torch.equal(outcomes(*three, 9, 0.3, seed=4), outcomes(*three, 9, 0.3, seed=4))


def test_clean_images_look_like_drawings_of_what_they_show(clip, tmp_path):
    """As drawings do; whatever was asked. Noise takes that from them, and what cannot be read has none."""
    made = drawings(SEEN[:40], seed=5)
    noise = torch.Generator().manual_seed(0)
    spoilt = [ImageChops.add(image, Image.fromarray(torch.randint(60, (64, 64, 3), generator=noise).byte().numpy()))
              for image in made]  # fmt: skip
    spoilt[3] = Image.new("RGB", (64, 64), "white")
    found = []
    for name, pictures in (("made", made), ("spoilt", spoilt)):
        (tmp_path / name).mkdir()
        paths = [tmp_path / name / f"{i}.png" for i in range(40)]
        for path, one_picture in zip(paths, pictures):
            one_picture.save(path)
        found.append(clean(paths, embed_images(clip, pictures), clip, 0))
    assert set(found[0] + found[1]) == {0.0, 1.0} and found[1][3] == 0
    assert sum(found[0]) >= 0.85 * 40 > 0.5 * 40 > sum(found[1])

    mixed = []  # objects of a color that is none of the palette's: each of their drawings has another one
    for i, image in enumerate(drawings(["one red circle in the snow"] * 40, seed=6)):
        pixels = np.array(image)
        pixels[pixels[..., 1] < 120] = 20, 150, 20
        mixed.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(mixed[-1])
    paths = [tmp_path / "spoilt" / f"{i}.png" for i in range(40)] + mixed
    features = embed_images(clip, [Image.open(path).convert("RGB") for path in paths])
    assert clean(paths, features, clip, 0)[:40] == clean(
        paths[:40], features[:40], clip, 0
    )  # the threshold is as before
    assert clean(mixed, features[40:], clip, 0) == [0] * 40


def test_sets_are_compared_by_kind_rater_and_group(clip, tmp_path, monkeypatch):
    items = items_of("aabbcc", *[("seen",)] * 4, *[("new objects",)] * 2)
    annotated = {"A": [1.0, 0, 0, 0, 1, 1], "B": [1.0, 1, 0, 0, 0, 1]}
    people = {"A": [1.0, 0, 0, 0, 1, None], "B": [1.0, 1, 0, 0, 0, 1]}
    sides = [side(name, simulated_annotator=annotated[name], people=people[name]) for name in annotated]
    asked = []

    def clean_of_a(paths, *how):
        asked.append(paths)
        return [float(path.name[0] == "A") for path in paths]

    monkeypatch.setattr("minialign.evaluate.sets.clean", clean_of_a)
    found = compared_sets(sides, items, 2, clip, 0)
    assert [len(paths) for paths in asked] == [12]  # both sides by one threshold
    assert found["size"] == 2 and set(found["compared"]) == {"alignment", "fidelity"}
    alone = found["compared"]["alignment"]["simulated annotator"]["B"]
    assert alone["overall"] == {"won": 1 / 3, "tied": 1 / 3, "lost": 1 / 3, "n": 3}
    assert alone["seen"] == {"won": 0.5, "tied": 0.5, "lost": 0, "n": 2} and alone["new objects"]["lost"] == 1
    assert found["compared"]["alignment"]["people"]["B"]["overall"]["n"] == 2  # one set is not labelled whole
    assert found["compared"]["fidelity"]["simulated annotator"]["B"]["overall"]["lost"] == 1
    assert "nine noisy copies" in found["compared"]["fidelity"]


def test_gains_of_diversity_and_of_the_readable_fraction_have_intervals_over_prompts():
    """Pair by pair: each distance of two images of one prompt, whose deviations are summed within the prompt."""
    g, items = torch.Generator().manual_seed(0), items_of("aaabbccccd")
    verdicts = {"A": ["good", "skip"] * 5, "B": ["bad"] * 7 + ["skip"] * 3}
    sides = [
        replace(side(name, CLIP_score=[0.5] * 10), features=torch.randn(10, 8, generator=g), verdicts=verdicts[name],
                readable=0.5)
        for name in "AB"
    ]  # fmt: skip
    found = gains(sides, items)
    prompts, pairs = [item.prompt for item in items], []
    for i, j in itertools.permutations(range(10), 2):
        if prompts[i] == prompts[j]:
            cosines = [float(torch.cosine_similarity(one.features[i], one.features[j], dim=0)) for one in sides]
            pairs.append((prompts[i], *(1 - cosine for cosine in cosines)))
    texts, before, after = zip(*pairs)
    one = found["diversity"]["B"]
    assert one["gain"] == pytest.approx(diversity(sides[1].features, prompts) - diversity(sides[0].features, prompts))
    assert one["gain_ci95"] == pytest.approx(paired_interval(before, after, texts, (-2, 2)), abs=1e-6)
    one = found["readable"]["B"]
    readable = ([float(verdict != "skip") for verdict in verdicts[name]] for name in "AB")
    assert one["gain"] == pytest.approx(0.7 - 0.5) and one["gain_ci95"] == paired_interval(*readable, prompts)
    alone = [replace(one, readable=None) for one in sides]
    assert gains(alone, items)["readable"] == {} and gains([replace(one, features=one.features[:2]) for one in alone],
                                                           items_of("ab"))["diversity"] == {}  # fmt: skip


def test_samples_are_the_first_of_each_group():
    items = items_of("ab" * 20, ("count", "seen"), ("unseen",))
    sides = [side(name, reward=[0.5] * 40) for name in "AB"]
    shown = samples(sides, items, Path())
    assert Counter(tuple(one["groups"]) for one in shown) == {("count", "seen"): SAMPLES, ("unseen",): SAMPLES}
    assert [one["seed"] for one in shown] == [*range(0, 16, 2), *range(1, 17, 2)]
    assert shown[0]["images"] == {"A": "A-0.png", "B": "B-0.png"} and shown[0]["verdicts"] == {"A": None, "B": None}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained()


@pytest.fixture(scope="module")
def clip():
    return CLIP.from_pretrained()


def test_a_model_samples_once_and_people_s_labels_of_its_images_count(pipe, clip, tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", SEEN[:4])
    settings = settings_of(run, test_images=9)
    items = test_items(run, settings)
    torch.manual_seed(0)
    reward = RewardModel({"width": 64, "hidden": 8, "clip": None})
    how = (items, settings, clip, reward)
    found = evaluate_model(run, "the base", None, lambda: pipe, *how)
    assert found.folder.parent == run.folder / "compare" and found.folder.name.startswith("the-base-")
    assert [path.parent for path in found.paths] == [found.folder / "images"] * 9 and found.source == "bundled"
    assert set(found.values) == {"simulated annotator", "reward", "CLIP score"} and found.features.shape == (9, 64)
    assert found.values["simulated annotator"] == [float(verdict == "good") for verdict in found.verdicts]
    assert found.readable == sum(verdict != "skip" for verdict in found.verdicts) / 9
    pictures = [Image.open(path) for path in found.paths]
    score = reward.score(pictures, [item.prompt for item in items])
    assert found.values["reward"] == pytest.approx(score.tolist(), abs=1e-5)
    again = pipe.generate(items[3].prompt, steps=1, guidance=1.0, latents=pipe.noise([items[3].seed]))[0]
    assert max(abs(a - b) for a, b in zip(again.tobytes(), pictures[3].tobytes())) <= 1
    store = FeedbackStore(found.folder)
    stored = store.images()
    assert [(image.prompt, image.seed) for image in stored] == [(item.prompt, item.seed) for item in items]
    store.add_labels("ann", [(stored[0].id, "good"), (stored[5].id, "bad"), (stored[6].id, "skip")])
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", None)  # calling it would fail: all is there
        labelled = evaluate_model(run, "the base", None, lambda: pipe, *how)
    assert labelled.values["people"] == [1.0, None, None, None, None, 0.0, None, None, None]
    assert {key: value for key, value in labelled.values.items() if key != "people"} == found.values
    other = evaluate_model(run, "the base", None, lambda: pipe, items, settings | {"guidance": 2.0}, clip, None)
    assert other.folder != found.folder and set(other.values) == {"simulated annotator", "CLIP score"}
    monkeypatch.setattr(pipe, "world", "")
    strange = evaluate_model(run, "x", "someone/x", lambda: pipe, items[:2], settings, clip, None)
    assert set(strange.values) == {"CLIP score"} and strange.readable is None and strange.verdicts == [None, None]


def test_distances_are_to_good_images_where_there_are_any(clip, tmp_path):
    run, items = run_of(tmp_path / "run", SEEN[:6]), items_of("aabbcc")
    sides = [replace(side(name, CLIP_score=[0.5] * 6), features=torch.randn(6, 64)) for name in "AB"]
    assert reference_features(run, None, clip) == (None, None)
    found = distances(run, None, sides, items, clip, 0)
    assert found["reference"] is None and found["frechet"] == found["cmmd"] == {"A": None, "B": None}
    store = FeedbackStore(run.folder)
    images = store.images()
    store.add_labels("ann", [(image.id, "good" if image.id % 2 else "bad") for image in images])
    store.close()
    target, origin = reference_features(run, None, clip)
    good = embed_images(clip, [Image.open(image.path) for image in images if image.id % 2])
    torch.testing.assert_close(target, good)
    assert origin == "the 3 images labelled good" and (run.folder / FEATURES).exists()
    found = distances(run, None, sides, items, clip, 0)
    assert found["frechet"]["A"] == frechet_distance(sides[0].features, target) and found["reference"] == origin
    assert found["cmmd"]["B"] == cmmd(sides[1].features, target)
    assert found["diversity"]["A"] == diversity(sides[0].features, list("aabbcc"))
    assert found["readable"] == {"A": None, "B": None}


def test_a_reference_is_a_folder_of_images(tmp_path, clip, capsys):
    run, folder = run_of(tmp_path / "run", SEEN[:3]), tmp_path / "real"
    shutil.copytree(run.folder / "images", folder / "below")
    (folder / "notes.txt").write_text("no image")
    (folder / "drawing.svg").write_text("")
    paths = reference_images(folder)
    assert paths == sorted((folder / "below").iterdir())
    assert "3 images are read, 1 are of other kinds, such as" in capsys.readouterr().out
    target, origin = reference_features(run, paths, clip)
    torch.testing.assert_close(target, embed_images(clip, [Image.open(path) for path in paths]))
    assert origin == "the 3 images of --reference"
    for wrong in (tmp_path / "none", folder / "notes.txt"):
        with pytest.raises(InputError, match="--reference .*: fewer than two images; accepted: a folder of images"):
            reference_images(wrong)


def test_distances_of_the_embedded_world_are_to_drawings_of_as_many_readable_images_of_each_model(
    clip, tmp_path, monkeypatch
):
    run, items = run_of(tmp_path / "run", SEEN[:6]), [TestItem(text, 0, ()) for text in SEEN[:6]]
    paths = sorted((run.folder / "images").iterdir())
    sides = []
    for name, verdicts in (("A", ["good"] * 3 + ["bad"] * 3), ("B", ["skip", "good", "bad", "good", "bad", "skip"])):
        one = replace(side(name, simulated_annotator=[1.0] * 6), paths=paths, verdicts=verdicts)
        sides.append(replace(one, features=embed_images(clip, [Image.open(path) for path in paths])))
    found = distances(run, None, sides, items, clip, 3)
    chosen = [1, 2, 3, 4]  # of B, all that are readable
    again = shown([Image.open(paths[i]).convert("RGB") for i in chosen], 3)
    expected = frechet_distance(sides[1].features[chosen], embed_images(clip, again))
    assert found["frechet"]["B"] == pytest.approx(expected) and found["frechet"]["A"] > 0
    assert found["reference"] == "fresh drawings of what the images show, 4 of each model"
    monkeypatch.setattr("minialign.evaluate.judges.DISTANCES", 3)
    fewer = distances(run, None, sides, items, clip, 3)
    assert fewer["reference"].endswith("3 of each model") and fewer["frechet"]["B"] != found["frechet"]["B"]
    sides[1] = replace(sides[1], verdicts=["skip"] * 5 + ["bad"])  # too few to say anything of
    found = distances(run, None, sides, items, clip, 3)
    assert found["reference"] is None and found["frechet"] == found["cmmd"] == {"A": None, "B": None}


# ---------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def drawn(tmp_path_factory, pipe):
    """A run with a fine-tuned model and a reward model of random weights."""
    run = run_of(tmp_path_factory.mktemp("evaluate") / "run", SEEN[:4], **SMALL)
    tuned = Pipeline.from_pretrained()
    with torch.no_grad():
        tuned.unet.conv_out.bias += 0.03
    tuned.save_pretrained(run.folder / "model")
    torch.manual_seed(0)
    RewardModel({"width": 64, "hidden": 8, "clip": None}).save_pretrained(run.folder / "reward")
    return run.folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_command_compares_pipelines(drawn, tmp_path, monkeypatch, capsys, request):
    run = Path(shutil.copytree(drawn, tmp_path / "run"))
    code, out, err = command(main, capsys, run)
    assert code == 0, err
    found = results_of(run)["evaluation"]
    assert list(found["models"]) == ["base", "fine-tuned"]
    assert found["reference"].startswith("fresh drawings of what the images show")
    assert set(found["judged"]) == {"simulated annotator", "reward", "CLIP score"}
    assert found["judge"] == "simulated annotator" and found["judged"]["reward"]["base"]["overall"]["n"] == 9
    assert all(value is not None for key in ("frechet", "cmmd", "diversity") for value in found[key].values())
    assert all(one["fine-tuned"]["gain_ci95"] is not None for one in found["picture"].values())
    assert "fine-tuned over base: " in out and "CMMD (lower" in out and (run / "report.html").exists()
    folders = " or ".join(str(run / one["images"]) for one in found["models"].values())
    assert f"label these images: python -m minialign.label FOLDER, where FOLDER is {folders}\n" in out
    assert results_of(run)["counts"] == {"images": 4, "labels": 0, "evaluated": 9}
    assert all((run / path).exists() for sample in found["samples"] for path in sample["images"].values())
    pytest.importorskip("matplotlib")
    assert Image.open(run / "best-of-n.png").size[1] > 300
    whole = Pipeline.generate
    request.getfixturevalue("without_matplotlib")
    monkeypatch.setattr(Pipeline, "generate", None)  # calling it would fail: all is there
    code, out, err = command(main, capsys, run)
    assert code == 0 and "evaluate: done before" in out, err
    for model, verdict in (("base", "bad"), ("fine-tuned", "good")):
        store = FeedbackStore(run / found["models"][model]["images"])
        store.add_labels("ann", [(image.id, verdict) for image in store.images()[:5]])
        store.close()
    code, _, err = command(main, capsys, run)
    assert code == 2 and "stage evaluate is out of date: the labels of these models' images changed; --redo" in err
    code, out, err = command(main, capsys, run, "--redo")
    assert code == 0, err
    again = results_of(run)["evaluation"]
    people = again["judged"]["people"]["fine-tuned"]["overall"]
    assert (people["value"], people["n"], people["gain"]) == (1.0, 5, 1.0)
    assert again["judged"]["reward"] == found["judged"]["reward"]
    monkeypatch.setattr(Pipeline, "generate", whole)
    Pipeline.from_pretrained().save_pretrained(run / "model")  # whose images nobody has labelled
    code, _, err = command(main, capsys, run)
    assert code == 2 and "out of date: the fine-tuned model changed; --redo" in err
    assert command(main, capsys, run, "--redo")[0] == 0
    assert results_of(run)["evaluation"]["judged"]["people"].keys() == {"base"}
    assert "evaluate: done before" in command(main, capsys, run)[1]


@pytest.mark.usefixtures("without_matplotlib")
def test_a_model_gains_nothing_over_itself_and_comparisons_are_kept_beside_one_another(drawn, tmp_path):
    run = Run(Path(shutil.copytree(drawn, tmp_path / "run")))
    models = ["bundled", str(EMBEDDED), str(run.folder / "model")]  # the last two of one name, with equal first layers
    name = compare_models(run, settings_of(run, **TWO), CPU, models=models)
    found = results_of(run.folder)["comparisons"][name]
    assert list(found["models"]) == models and [one["source"] for one in found["models"].values()] == models
    judged = found["judged"]["reward"]
    assert judged["bundled"]["overall"]["value"] == judged[models[1]]["overall"]["value"]
    assert judged[models[1]]["overall"]["gain_ci95"] == [0.0, 0.0]
    assert judged[models[2]]["overall"]["value"] != judged[models[1]]["overall"]["value"]
    pictures = [
        [path.read_bytes() for path in sorted((run.folder / found["models"][model]["images"]).rglob("*.png"))]
        for model in models
    ]
    assert pictures[0] == pictures[1] != pictures[2] and len(set(pictures[0])) == 3
    file = tmp_path / "mine.txt"
    file.write_text("a fox\n")
    other = compare_models(run, settings_of(run, **TWO), CPU, models=models[:1], prompts=file)
    kept = results_of(run.folder)["comparisons"]
    assert set(kept) == {name, other} and kept[name] == found and "evaluation" not in results_of(run.folder)
    assert kept[other]["judge"] == "reward" and kept[other]["reference"] is None  # nobody can judge a fox
    older = ["embedded", *models[1:]]  # the older name of the bundled model
    assert compare_models(run, settings_of(run, **TWO), CPU, models=older) == name
    assert (
        "evaluated" not in write_results(run)["counts"] and results_of(run.folder)["comparisons"].keys() == kept.keys()
    )


@pytest.mark.usefixtures("without_matplotlib")
def test_sets_are_in_the_results_and_told(drawn, tmp_path):
    run = Run(Path(shutil.copytree(drawn, tmp_path / "run")))
    settings = settings_of(run, test_images=12, test_images_per_prompt=None, sets=2)
    name = compare_models(run, settings, CPU, models=["bundled", str(run.folder / "model")])
    found = results_of(run.folder)["comparisons"][name]
    assert found["sets"]["size"] == 2 and found["settings"]["sets"] == 2
    by_rater = found["sets"]["compared"]["alignment"]
    assert by_rater.keys() == {"simulated annotator", "nine noisy copies"}
    for models in by_rater.values():
        (groups,) = models.values()
        assert groups["overall"]["n"] == 6 == sum(groups[name]["n"] for name in NAMES)
    told = comparison(found)
    assert "alignment of sets of 2 images of a prompt, against the first model's" in told
    assert "by nine noisy copies: won " in told and " of 6" in told


@pytest.mark.usefixtures("without_matplotlib")
def test_the_judge_is_one_who_judged_all_models(drawn, tmp_path):
    """People who labelled the images of one model alone have compared nothing."""
    run = Run(Path(shutil.copytree(drawn, tmp_path / "run")))
    file = tmp_path / "mine.txt"
    file.write_text("a fox\n")
    models = ["bundled", str(run.folder / "model")]
    for labelled, judge in ((0, "reward"), (1, "people")):
        name = compare_models(run, settings_of(run, **TWO), CPU, models=models, prompts=file)
        store = FeedbackStore(
            run.folder / results_of(run.folder)["comparisons"][name]["models"][models[labelled]]["images"]
        )
        store.add_labels("ann", [(image.id, "good") for image in store.images()])
        store.close()
        compare_models(run, settings_of(run, **TWO), CPU, models=models, prompts=file)
        assert results_of(run.folder)["comparisons"][name]["judge"] == judge


@pytest.mark.usefixtures("without_matplotlib")
def test_what_cannot_be_compared_is_one_line(drawn, tmp_path, capsys):
    run = Path(shutil.copytree(drawn, tmp_path / "run"))
    (run / ".lock").touch()
    (tmp_path / "empty").mkdir()
    plain = run_of(tmp_path / "plain", SEEN[:2]).folder
    (plain / ".lock").touch()
    cases = [
        ((tmp_path / "nowhere",), "nowhere: not a run; accepted: a run's folder"),
        ((tmp_path / "empty", "--models", "bundled"), "empty: not a run; accepted: a run's folder"),
        ((plain,), f"plain: no model/ to compare; python -m minialign.finetune {plain} makes it"),
        ((run, "--models", "./nowhere", "bundled"), "./nowhere: not found"),
        ((run, "--models", "bundled", "--prompts", tmp_path / "none.txt"), "none.txt: cannot be read"),
        ((run, "--models", "bundled", "--reward", tmp_path / "empty"), "config.json: cannot be read"),
        ((run, "--test-images", 1), "--test-images: '1'; accepted: a whole number from 2 to 100000"),
        ((run, "--test-images-per-prompt", 0), "--test-images-per-prompt: '0'; accepted:"),
        ((run, "--model", "bundled"), "--model"),
        ((run, "--reference", tmp_path / "empty"), "empty: fewer than two images; accepted: a folder of images"),
    ]
    held = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        code, _, err = command(main, capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("error: "), (arguments, err)
        assert sorted(tmp_path.rglob("*")) == held, arguments
