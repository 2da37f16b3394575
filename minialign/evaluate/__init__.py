"""Section 4 of the paper: what fine-tuning did to alignment, fidelity and diversity; the stage and its results file.

`evaluate_run` compares a run's model before and after; `compare_models` any models, on any prompts. Both write the same
thing: each judge's labels or scores by group, distances to good images, and the best of N (docs/formats.md,
results.json).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.cache import clip_digest
from ..engine.processes import is_main_process
from ..engine.run import Run, digest, file_digest
from ..engine.settings import BY_NAME, CLIP_OF_PAPER, NOISES
from ..feedback import SIMULATED, FeedbackStore, read_prompts
from ..files import InputError, read_json, write_json
from ..generate import load_model, noise_seed
from ..models.clip import CLIP
from ..models.pretrained import WEIGHTS
from ..pages.figures import plot_best_of
from ..pipeline import Pipeline
from ..prompts import recognise, split, spread
from ..reward import MODEL, REWARDS, load_reward, read_measured, scorer
from ..shapes.world import GRAMMAR, WORLD
from .judges import BUNDLED, PEOPLE, REWARD, Judged, Score, TestItem, distances, evaluate_model, reference_images
from .sets import compared_sets
from .tables import best_of_curves, by_group, gains, picture, samples

__all__ = [
    "Judged",
    "TestItem",
    "compare_models",
    "evaluate_model",
    "evaluate_run",
    "images_per_prompt",
    "test_items",
    "write_results",
]
BASE, TUNED = "base", "fine-tuned"
EMPTY: dict[str, Any] = {"judge": "", "models": {}, "judged": {}}  # what an evaluation has at least
LABELS = "labels of these models' images"  # as something that the evaluation is made from
Model = tuple[str, str | None, Callable[[], Pipeline]]  # its name, where it is from, what loads it


# ------------------------------------------------------------------------------------------------------- what is asked
def test_items(run: Run, settings: Mapping[str, Any], file: Path | None = None) -> list[TestItem]:
    """The prompts and starting noises that models are compared on, spread evenly over categories and over `sides`.

    The prompts of `file`, or the run's own and, where they are of a grammar, those that it holds out from feedback. Of
    a run of the bundled model with prompts of its grammar, all that get feedback and all that are held out. InputError
    where there are none.
    """
    rng, seed = random.Random(settings["seed"]), settings["seed"]
    own, dealt = _stored_prompts(run.folder), run.settings.get("seed", seed)  # which decides what is held out
    of_world = [prompt.text for prompt in split(GRAMMAR, dealt).seen]
    if file is None and run.world == WORLD and set(own) <= set(of_world):
        if settings.get("images"):  # the test's prompts follow those of the feedback in one random order
            spread(of_world, _categories(of_world), settings["images"], rng)
        sides = _sides(of_world + _held_out(of_world, dealt), of_world)
    else:
        sides = _sides(read_prompts(file) if file is not None else own + _held_out(own, dealt), own)
    if not sides:
        raise InputError(f"{run.folder}: no prompts to compare on; accepted: a run with images, or --prompts FILE")
    repeat = images_per_prompt(settings)
    if settings["test_images"] > NOISES:
        raise InputError(f"--test-images: {settings['test_images']}; accepted: up to {NOISES}")
    items: list[TestItem] = []
    for name, prompts in sides.items():
        number = max(1, settings["test_images"] // len(sides) // repeat)
        for prompt in spread(prompts, _categories(prompts), number, rng):
            category = _category(prompt)
            groups = (category, name) if category else (name,)
            for _ in range(repeat):
                items.append(TestItem(prompt, noise_seed(seed, len(items), test=True), groups))
    return items


def images_per_prompt(settings: Mapping[str, Any]) -> int:
    """How many images of each prompt the test has; InputError where sets would be incomplete."""
    number = settings["test_images_per_prompt"] or settings["sets"] or 1
    if settings["sets"] and number % settings["sets"]:
        raise InputError(
            f"--test-images-per-prompt: {number}; accepted with --sets {settings['sets']}: a multiple of it"
        )
    return int(number)


def _stored_prompts(folder: Path) -> list[str]:
    """The prompts of a run's images, each once."""
    if not (folder / "feedback.sqlite").is_file():
        return []
    store = FeedbackStore(folder, read_only=True)
    try:
        return list(dict.fromkeys(image.prompt for image in store.images()))
    finally:
        store.close()


def _held_out(own: Sequence[str], seed: int) -> list[str]:
    """The held-out prompts of the grammars that all of the prompts `own` are of; none where one is of no grammar."""
    recognised = [known for text in own if (known := recognise(text)) is not None]
    if len(recognised) < len(own):
        return []
    splits = [split(grammar, seed) for grammar in dict.fromkeys(known[1] for known in recognised)]
    return [prompt.text for prompts in splits for prompt in (*prompts.new_combinations, *prompts.new_objects)]


def _sides(texts: Sequence[str], own: Sequence[str]) -> dict[str, list[str]]:
    """The texts by what the prompts `own`, which have feedback, say of them; in each group each text once.

    They are seen, new combinations of words of a grammar, prompts of new objects, which no prompt of `own` names, or
    unseen, in words of no grammar.
    """
    objects = {known[0].object for text in own if (known := recognise(text)) is not None}
    mine = set(own)
    groups: dict[str, list[str]] = {name: [] for name in ("seen", "new combinations", "new objects", "unseen")}
    for text in dict.fromkeys(texts):
        known = recognise(text)
        if text in mine:
            groups["seen"].append(text)
        elif known is None:
            groups["unseen"].append(text)
        else:
            groups["new combinations" if known[0].object in objects else "new objects"].append(text)
    return {name: members for name, members in groups.items() if members}


def _category(text: str) -> str:
    known = recognise(text)
    return known[0].category if known else ""


def _categories(texts: Sequence[str]) -> list[str]:
    return [_category(text) for text in texts]


# ---------------------------------------------------------------------------------------------------- what is answered
def evaluate(
    run: Run,
    models: Sequence[Model],
    items: Sequence[TestItem],
    settings: dict[str, Any],
    device: torch.device,
    *,
    reward: Path | None,
    score: Score | None = None,
    reference: Path | None = None,
) -> dict[str, Any]:
    """Models (name, source, loader) compared on the items, one entry of results.json; gains are over the first.

    reward: the folder of the reward model that judges; score: what judges in its place.
    """
    good = reference_images(reference) if reference is not None else None  # a mistake is reported before all sampling
    learned = load_reward(reward, device) if reward is not None else None
    own = reward is None or reward == run.folder / "reward"  # the run knows where its CLIP lies now
    clip = learned.clip if learned is not None and not own else CLIP.from_pretrained(settings["clip"], device=device)
    learned_with = run.stages.get("reward", {}).get("made_from", {}).get("clip")
    if own and learned is not None and learned_with not in (None, digest(clip_digest(clip))):
        raise InputError(f"CLIP {settings['clip']}: not the one that the reward model of {run.folder} learned with")
    sides = [evaluate_model(run, *model, items, settings, clip, learned, score) for model in models]
    judges = list(dict.fromkeys(name for side in sides for name in side.values))
    judged = {name: by_group(sides, name, items) for name in judges}
    of_all = [name for name in judges if all("overall" in judged[name].get(side.name, {}) for side in sides)]
    return {
        "judge": next(name for name in (SIMULATED, PEOPLE, REWARD, *of_all) if name in of_all),
        "models": {
            side.name: {"source": side.source, "images": side.folder.relative_to(run.folder).as_posix()}
            for side in sides
        },
        "settings": {key: settings[key] for key in settings if "evaluate" in BY_NAME[key].stages},
        "judged": judged,
        **distances(run, good, sides, items, clip, settings["seed"]),
        **({"reference": str(reference)} if reference is not None else {}),
        "gains": gains(sides, items),
        "picture": picture(sides, items),
        "best_of_n": best_of_curves(sides, items),
        **({"sets": compared_sets(sides, items, size, clip, settings["seed"])} if (size := settings["sets"]) else {}),
        "samples": samples(sides, items, run.folder),
    }


def run_models(run: Run, device: torch.device, dtype: str) -> list[Model]:
    """A run's base model and its fine-tuned one; InputError where there is no fine-tuned one yet."""
    tuned = run.folder / "model"
    if not (tuned / "model_index.json").is_file():
        raise InputError(f"{run.folder}: no model/ to compare; python -m minialign.finetune {run.folder} makes it")
    after = partial(Pipeline.from_pretrained, tuned, device=device, dtype=getattr(torch, dtype))
    base = partial(load_model, run, {}, device, dtype)
    return [(BASE, run.settings.get("model"), base), (TUNED, str(tuned), after)]


def evaluate_run(
    run: Run, settings: dict[str, Any], device: torch.device, redo: bool = False, named: bool = False
) -> None:
    """The last stage of a run, unless it is done: its model before and after, in results.json.

    named: the command itself names the run's --reward, which may be code.
    """
    models = run_models(run, device, settings["sampling_dtype"])
    items = test_items(run, settings)
    given = "reward" in run.stages.get("reward", {}).get("made_from", {})
    coming = is_main_process() and (redo or "seconds" not in run.stages.get("evaluate", {}))
    score = scorer(run.folder, settings, device, named) if given and coming else None

    def inputs() -> dict[str, str]:
        return {
            "test prompts": digest(json.dumps([(item.prompt, item.seed) for item in items])),
            "fine-tuned model": file_digest(run.folder / "model" / "unet" / f"{WEIGHTS[0]}.safetensors"),
            "reward model": file_digest(run.folder / REWARDS if given else run.folder / "reward" / MODEL),
            LABELS: _labels_of_images(run),
        }

    why = f"before and after sample {len(items)} images each from the same new noise"
    with run.stage("evaluate", why, settings, inputs, redo=redo) as todo:
        if todo:
            own = None if given else run.folder / "reward"
            evaluation = evaluate(run, models, items, settings, device, reward=own, score=score)
            store_results(run, {"evaluation": evaluation})
            run.stages["evaluate"]["made_from"][LABELS] = _labels_of_images(run)
            plot_best_of(run.folder / "best-of-n.png", evaluation["best_of_n"])


def _labels_of_images(run: Run) -> str:
    """`digest` of what people said of the images that the run's models were judged by."""
    rows = []
    for model in read_results(run).get("evaluation", {}).get("models", {}).values():
        place = run.folder / model["images"]
        if (place / "feedback.sqlite").is_file():
            store = FeedbackStore(place, read_only=True)
            rows += store.label_rows()
            store.close()
    return digest(json.dumps(rows))


def compare_models(
    run: Run,
    settings: dict[str, Any],
    device: torch.device,
    *,
    models: Sequence[str] | None = None,
    prompts: Path | None = None,
    reward: Path | None = None,
    reference: Path | None = None,
) -> str:
    """A further comparison, kept beside others in results.json; its name there."""
    if models:
        names = dict.fromkeys(BUNDLED if name == "embedded" else name for name in models)  # embedded: its older name
        options = {"device": device, "dtype": getattr(torch, settings["sampling_dtype"])}
        chosen: list[Model] = []
        for name in names:
            source = None if name == BUNDLED else name
            chosen.append((name, source, partial(Pipeline.from_pretrained, source, **options)))
    else:
        chosen = run_models(run, device, settings["sampling_dtype"])
    if reward is None and (run.folder / "reward" / MODEL).is_file():
        reward = run.folder / "reward"
    if settings["clip"] is None and not run.world and reward is None:
        settings = settings | {"clip": CLIP_OF_PAPER}
    items = test_items(run, settings, prompts)
    evaluation = evaluate(run, chosen, items, settings, device, reward=reward, reference=reference)
    content = [sorted(one["images"] for one in evaluation["models"].values()), str(reward), str(reference)]
    name = digest(json.dumps(content)).partition(":")[2][:8]
    before = read_results(run).get("comparisons", {})
    store_results(run, {"comparisons": before | {name: evaluation}})
    plot_best_of(run.folder / "best-of-n.png", evaluation["best_of_n"])
    return name


# ------------------------------------------------------------------------------------------------ the one results file
def read_results(run: Run) -> dict[str, Any]:
    path = run.folder / "results.json"
    results = read_json(path) if path.exists() else {}
    for one in (results.get("evaluation", EMPTY), *dict(results.get("comparisons", {})).values()):
        if not isinstance(one, dict) or not EMPTY.keys() <= one.keys():
            raise InputError(f"{path}: damaged; remove it, then --redo makes it again")
    return results


def store_results(run: Run, entries: Mapping[str, Any]) -> None:
    write_json(run.folder / "results.json", read_results(run) | dict(entries))


def write_results(run: Run) -> dict[str, Any]:
    """Bring results.json up to date with what the run's stages left; its content."""
    seconds = {name: state["seconds"] for name, state in run.stages.items() if "seconds" in state}
    results: dict[str, Any] = {"minialign": __version__, "settings": run.settings}
    results["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    results["interruptions"] = sum(state["begun"] - 1 for state in run.stages.values())  # their time is not counted
    store = FeedbackStore(run.folder, read_only=True)
    try:
        images, labels = len(store.images()), len(store.labels())
    finally:
        store.close()
    results["counts"] = {"images": images, "labels": labels}
    held_out = run.folder / "reward" / "held_out.json"
    if held_out.exists():
        results["reward"] = read_measured(held_out.parent)
    before = read_results(run)
    if "evaluation" in before:
        first = before["evaluation"]["judged"][before["evaluation"]["judge"]][BASE]["overall"]
        results["counts"]["evaluated"] = first["n"]
    write_json(run.folder / "results.json", before | results)
    return before | results
