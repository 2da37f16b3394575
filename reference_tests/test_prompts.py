"""The prompt grammars: sentences, categories, held-out combinations, contrastive prompts and noisy captions."""

import random
from collections import Counter

import pytest

from minialign.prompts import (
    ATTRIBUTES,
    CATEGORIES,
    PAPER,
    SHAPES,
    Prompt,
    all_prompts,
    contrastive,
    contrastive_texts,
    corrupt,
    parse,
    recognise,
    split,
)


def test_sentences_and_their_parse():
    assert Prompt("count", "circle", count="two").text == "two circles"
    assert Prompt("count", "star", count="one").text == "one star"
    assert Prompt("color", "apple", color="red").text == "a red apple"
    assert Prompt("background", "owl", background="at night").text == "an owl at night"
    assert Prompt("combination", "dog", "three", "blue", "in the city").text == "three blue dogs in the city"
    texts = [prompt.text for prompt in all_prompts(SHAPES)]
    assert len(texts) == len(set(texts)) == 16 * 3 + 256
    assert all(parse(prompt.text, SHAPES) == prompt for prompt in all_prompts(SHAPES))
    assert parse("a green circle", SHAPES) is None


def test_unseen_prompts_are_new_combinations_of_seen_words():
    seen, unseen, others = split(SHAPES)
    assert Counter([*seen, *unseen, *others]) == Counter(all_prompts(SHAPES))
    shares = [Counter(prompt.category for prompt in prompts) for prompts in (unseen, others)]
    assert shares[0] == {"count": 4, "color": 4, "background": 4, "combination": 64}
    assert shares[1] == {"count": 2, "color": 2, "background": 2, "combination": 32}
    for attribute in ATTRIBUTES:
        assert {getattr(p, attribute) for p in unseen} <= {getattr(p, attribute) for p in seen}
    assert split(SHAPES) == (seen, unseen, others) and split(SHAPES, seed=1) != (seen, unseen, others)


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
    seen, unseen, others = split(PAPER, seed)
    assert len(seen) == 2702 and len(unseen) == 1079 and not set(seen) & set(unseen) | set(unseen) & set(others)
    assert Counter([*seen, *unseen, *others]) == Counter([*(p for part in split(PAPER, 1) for p in part)])  # in use
    assert {p.category for p in seen} == {p.category for p in unseen} == set(CATEGORIES)
    for attribute in ATTRIBUTES:
        assert {getattr(p, attribute) for p in unseen} <= {getattr(p, attribute) for p in seen}


def test_contrastive_texts_come_from_the_grammar_or_from_the_other_prompts():
    rng = random.Random(0)
    others = contrastive_texts("a green colored dog", 7, ["a fox", "a green colored dog"], rng)
    assert len(set(others)) == 7 and "a green colored dog" not in others
    assert all(recognise(text)[0].category == "color" for text in others)
    file = ["an owl, oil painting", "a fox", "a fox", "an owl, oil painting", "a ship"]
    assert sorted(contrastive_texts("a fox", 7, file, rng)) == ["a ship", "an owl, oil painting"]
    assert len(contrastive_texts("a fox", 1, file, rng)) == 1 and contrastive_texts("a fox", 7, ["a fox"], rng) == []


def test_contrastive_prompts_differ_in_what_the_prompt_says():
    rng = random.Random(0)
    for prompt in all_prompts(SHAPES):
        others = contrastive(prompt, 7, SHAPES, rng)
        assert len(set(others)) == 7 and prompt not in others
        assert {other.category for other in others} == {prompt.category}
    few = contrastive(Prompt("count", "circle", count="two"), 99, SHAPES, rng)
    assert len(few) == 15


def test_noisy_captions_are_wrong_as_often_as_asked():
    rng = random.Random(0)
    prompt = Prompt("combination", "circle", "two", "red", "at night")
    wrong = Counter()
    for _ in range(4000):
        noisy = corrupt(prompt, dict.fromkeys(ATTRIBUTES, 0.3), SHAPES, rng)
        wrong.update(a for a in ATTRIBUTES if getattr(noisy, a) != getattr(prompt, a))
    assert all(abs(wrong[a] / 4000 - 0.3) < 0.03 for a in ATTRIBUTES)
    assert corrupt(prompt, {}, SHAPES, rng) == prompt and CATEGORIES[-1] == prompt.category
