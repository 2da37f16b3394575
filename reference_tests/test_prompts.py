"""The prompt grammars: sentences, categories, held-out combinations, contrastive prompts and noisy captions."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from minialign.prompts import (
    ATTRIBUTES,
    CATEGORIES,
    PAPER,
    SHAPES,
    Prompt,
    all_prompts,
    contrastive_prompts,
    corrupt,
    parse,
    recognise,
    split,
    spread,
)


def test_sentences_and_their_parse():
    assert Prompt("count", "circle", count="two").text == "two circles"
    assert Prompt("count", "star", count="one").text == "one star"
    assert Prompt("count", "cross", count="two").text == "two crosses"
    assert Prompt("color", "apple", color="red").text == "a red apple"
    assert Prompt("background", "owl", background="at night").text == "an owl at night"
    assert Prompt("combination", "dog", "three", "blue", "in the city").text == "three blue dogs in the city"
    texts = [prompt.text for prompt in all_prompts(SHAPES)]
    assert len(texts) == len(set(texts)) == 24 * 3 + 384
    assert all(parse(prompt.text, SHAPES) == prompt for prompt in all_prompts(SHAPES))
    assert parse("a green circle", SHAPES) is None


def test_new_combinations_are_of_seen_words_and_new_objects_of_none():
    grammar = replace(SHAPES, objects=(*SHAPES.objects[:4], "ring", "moon"), held_out=("ring", "moon"))
    parts = split(grammar)
    assert Counter(prompt for part in parts for prompt in part) == Counter(all_prompts(grammar))
    counts = [Counter(prompt.category for prompt in part) for part in parts[1:]]
    assert counts[0] == {"count": 4, "color": 4, "background": 4, "combination": 64}
    assert counts[1] == {"count": 7, "color": 7, "background": 7, "combination": 112}
    assert counts[2] == {"count": 3, "color": 3, "background": 3, "combination": 48}
    for attribute in ATTRIBUTES:
        words = [{getattr(p, attribute) for p in part} for part in parts]
        assert words[1] == words[0] and words[3] == set(grammar.words(attribute)) | (words[0] & {None})
        assert words[2] == ({"ring", "moon"} if attribute == "object" else words[0])
    assert not {"ring", "moon"} & {p.object for p in (*parts.seen, *parts.new_combinations)}
    assert split(grammar) == parts and split(grammar, seed=1) != parts
    assert split(replace(grammar, held_out=())).new_objects == []


def test_the_papers_words_make_its_sentences():
    prompts = all_prompts(PAPER)
    texts = [prompt.text for prompt in prompts]
    assert len(texts) == len(set(texts)) == (6 + 9 + 8) * 25 + 6 * 9 * 8 * 25
    for text in (
        "three dogs", "six wolves", "two boxes", "one apple", "a green colored dog", "a black colored airplane",
        "a dog in the forest", "an orange on the moon", "two blue dogs in the city", "one white wolf in San Francisco",
    ):  # fmt: skip
        assert text in texts and recognise(text) == (prompts[texts.index(text)], PAPER)
    assert recognise("two circles")[1] is SHAPES and recognise("an astronaut on a horse") is None
    for attribute in ATTRIBUTES:  # a word twice would make a contrastive prompt of the same semantics
        assert len(set(PAPER.words(attribute))) == len(PAPER.words(attribute))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_papers_prompts_are_as_many_as_it_had(seed):
    parts = split(PAPER, seed)
    assert [len(part) for part in parts] == [2698, 1079, 928, 670] and len(set().union(*parts)) == sum(map(len, parts))
    assert Counter(p for part in parts for p in part) == Counter(p for part in split(PAPER, 1) for p in part)  # in use
    assert all({p.category for p in part} == set(CATEGORIES) for part in parts)
    for attribute in ATTRIBUTES:
        assert {getattr(p, attribute) for p in parts[1]} <= {getattr(p, attribute) for p in parts.seen}
    assert {p.object for p in parts.new_objects} == set(PAPER.objects) - {p.object for p in parts.seen}
    assert len(PAPER.objects) == 25 and len(set(PAPER.held_out)) == 5


def test_contrastive_prompts_contradict_and_are_among_those_that_were_judged():
    rng, texts = random.Random(0), [prompt.text for prompt in all_prompts(SHAPES)]
    for prompt in all_prompts(SHAPES)[::7]:
        others = contrastive_prompts(prompt.text, 7, texts, rng)
        assert len(set(others)) == 7 and set(others) < set(texts)
        for other in others:  # an image that shows one cannot show the other
            pairs = [(getattr(prompt, a), getattr(parse(other, SHAPES), a)) for a in ATTRIBUTES]
            assert any(mine and its and mine != its for mine, its in pairs), (prompt.text, other)
    judged = ["two circles", "two red circles at night", "a blue circle", "two stars", "two circles", "a fox"]
    assert sorted(contrastive_prompts("two circles", 7, judged, rng)) == ["a fox", "two stars"]
    assert contrastive_prompts("a green colored dog", 7, ["a dog on the moon", "a pink colored dog"], rng) == [
        "a pink colored dog"
    ]


def test_all_other_sentences_contrast_where_there_is_no_grammar():
    rng, file = random.Random(0), ["an owl, oil painting", "a fox", "an owl, oil painting", "a ship"]
    assert sorted(contrastive_prompts("a wolf by night", 7, file, rng)) == ["a fox", "a ship", "an owl, oil painting"]
    assert len(contrastive_prompts("a wolf by night", 1, file, rng)) == 1
    assert contrastive_prompts("a wolf by night", 7, [], rng) == []


@pytest.mark.parametrize("number", [1, 4, 6, 50, 2560])
def test_prompts_are_spread_evenly_over_categories_and_within_them(number):
    """In rounds of all of a category's prompts, each in an order of its own: the order that runs have had so far."""
    prompts = split(SHAPES, 5)[0]
    texts, categories = [prompt.text for prompt in prompts], [prompt.category for prompt in prompts]
    chosen = spread(texts, categories, number, random.Random(5))
    rng, expected = random.Random(5), []
    for i, category in enumerate(("count", "color", "background", "combination")):
        quota, mine = number // 4 + (i < number % 4), []
        while len(mine) < quota:
            mine += rng.sample([p.text for p in prompts if p.category == category], categories.count(category))
        expected += mine[:quota]
    assert chosen == expected and len(chosen) == number
    counts = Counter(parse(text, SHAPES).category for text in chosen)
    assert max(counts.values()) - min(counts[category] for category in CATEGORIES) <= 1
    of_each = Counter(chosen)
    for category in CATEGORIES:
        times = [of_each[text] for text, its in zip(texts, categories) if its == category]
        assert max(times) - min(times) <= 1


def test_sentences_of_no_grammar_are_a_category_and_absent_ones_take_no_share():
    texts, categories = ["a fox", "a ship", "two stars", "a lake"], ["", "", "count", ""]
    chosen = spread(texts, categories, 8, random.Random(0))
    assert Counter(chosen)["two stars"] == 4 and set(chosen) == set(texts)
    assert sorted(spread(texts[:2], ["", ""], 2, random.Random(0))) == ["a fox", "a ship"]


def test_noisy_captions_are_wrong_as_often_as_asked():
    rng = random.Random(0)
    prompt = Prompt("combination", "circle", "two", "red", "at night")
    wrong = Counter()
    for _ in range(4000):
        noisy = corrupt(prompt, dict.fromkeys(ATTRIBUTES, 0.3), SHAPES, rng)
        wrong.update(a for a in ATTRIBUTES if getattr(noisy, a) != getattr(prompt, a))
    assert all(abs(wrong[a] / 4000 - 0.3) < 0.03 for a in ATTRIBUTES)
    assert corrupt(prompt, {}, SHAPES, rng) == prompt and CATEGORIES[-1] == prompt.category
