"""Rewards that a run does not learn: reward models, CLIP scores and functions, several with weights (--reward).

    r(x,z) = sum_i w_i r_i(x,z) / sum_i w_i,   each r_i in [0,1]

The loss weighs an image by r: 0 leaves it out, 1 counts it whole. Dividing by the sum of the weights keeps r in [0,1],
so that beta and the learning rate mean the same with any reward.

A reward model's r_i counts as it is, and so do a function's numbers where all images of the run have one in [0,1]. All
other numbers are brought there in their own order: by a logistic regression on the run's labels, where there are FEWEST
of both kinds together, else by an image's rank among the images of its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.cache import clip_digest, features
from ..engine.run import digest, file_digest
from ..files import InputError, checksum, read_json
from ..measures import measure, platt, ranked_right
from ..models.clip import CLIP
from ..models.pretrained import WEIGHTS
from ..models.reward import RewardModel
from .functions import call_function, load_function
from .labels import FEWEST, SUBSETS, Compared, Split

MODEL = f"{WEIGHTS[1]}.safetensors"
LEARNED, CLIP_SCORE = "learned", "clip-score"  # the model that the run learns from its labels; CLIP's cosine
ACCEPTED = (
    "learned, clip-score, clip-score:CLIP, a reward model's folder, module:function or FILE.py:function, several "
    "separated by commas, each with =WEIGHT behind it or without"
)
AS_IT_IS, FITTED, RANKED = "as it is", "fitted to the labels", "rank within its prompt"


class Term(NamedTuple):
    """One reward and its weight, a number above 0."""

    what: str
    weight: float

    @property
    def is_function(self) -> bool:
        return ":" in self.what and not self.what.startswith(f"{CLIP_SCORE}:") and not Path(self.what).is_dir()

    @property
    def is_model(self) -> bool:
        return self.what == LEARNED or (self.what != CLIP_SCORE and Path(self.what).is_dir())


def read_terms(text: str | None, folder: Path) -> list[Term]:
    """The terms of --reward; None stands for the model that the run `folder` learns.

    InputError names a term that is invalid.
    """
    terms = []
    for word in (text or LEARNED).split(","):
        what, equals, number = word.strip().rpartition("=")
        if not equals or "/" in number:  # a path may have a = in it
            what, number = word.strip(), "1"
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise InputError(f"--reward {word.strip()}: weight {number!r}; accepted: a number above 0")
        if what and Path(what).resolve() == (folder / "reward").resolve():
            what = LEARNED
        term = Term(what, weight)
        known = what == CLIP_SCORE or what.startswith(f"{CLIP_SCORE}:") or term.is_model or term.is_function
        if not what or not known or what.endswith(":"):
            raise InputError(f"--reward {what or word}: not found; accepted: {ACCEPTED}")
        terms.append(term)
    return terms


def check_terms(terms: Sequence[Term], named: bool) -> None:
    """InputError where a reward cannot be loaded, or would run code that this command does not name itself."""
    for term in terms:
        if term.is_function and not named:
            raise InputError(
                f"--reward {term.what}: the run remembers it, but it is code, which runs only where the command names "
                "it; accepted: reward or finetune with --reward"
            )
        if term.is_function:
            load_function(term.what)
        elif term.is_model and term.what != LEARNED:
            load_reward(Path(term.what))


def load_reward(folder: Path, device: torch.device | str = "cpu") -> RewardModel:
    """The reward model of a folder; InputError where its weights are not those that were measured."""
    if not (folder / MODEL).is_file() and (folder / "reward" / MODEL).is_file():
        raise InputError(f"{folder}: a run, not a reward model; accepted: {folder / 'reward'}")
    measured = folder / "held_out.json"
    expected = read_json(measured).get("sha256") if measured.exists() else None
    if expected is not None and checksum(folder / MODEL) != expected:
        raise InputError(f"{folder / MODEL}: damaged: its SHA-256 is not that in held_out.json; learn it again")
    return RewardModel.from_pretrained(folder, device=device)


# ----------------------------------------------------------------------------------------------------- raw numbers
class Rewards:
    """The terms of a run's --reward: what they depend on, and the numbers that they give images.

    Each CLIP is loaded once. Features of the run's own CLIP are in cache/features.safetensors, of another one beside.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], device: torch.device):
        self.terms = read_terms(settings["reward"], folder)
        self.folder, self.settings, self.device = folder, settings, device
        self._clips: dict[str | None, CLIP] = {}

    @property
    def learned(self) -> bool:
        """Whether the model that the run learns from its labels is one of them."""
        return any(term.what == LEARNED for term in self.terms)

    @property
    def only_learned(self) -> bool:
        return all(term.what == LEARNED for term in self.terms)

    @property
    def functions(self) -> list[Term]:
        return [term for term in self.terms if term.is_function]

    def clip(self, source: str | None) -> CLIP:
        if source not in self._clips:
            self._clips[source] = CLIP.from_pretrained(source, device=self.device)
        return self._clips[source]

    def digest(self) -> str:
        """What stands for the terms: weights, and the content of models and of files of functions."""
        contents = []
        for term in self.terms:
            contents.append(f"{term.weight}")
            if term.is_function:
                contents += [term.what.rpartition(":")[2], file_digest(load_function(term.what)[1])]
            elif term.what == LEARNED:
                contents.append(LEARNED)
            elif term.is_model:
                source = load_reward(Path(term.what)).config.get("clip")
                contents += [file_digest(Path(term.what) / MODEL), clip_digest(self.clip(source)).hex()]
            else:
                contents += [CLIP_SCORE, clip_digest(self.clip(self._source(term))).hex()]
        return digest(*contents)

    def _source(self, term: Term) -> str | None:
        """The CLIP of a CLIP score: the one that is named, else the run's."""
        return term.what.partition(":")[2] or self.settings["clip"]

    @torch.no_grad()
    def raw(self, term: Term, paths: Sequence[Path], prompts: Sequence[str]) -> Tensor:
        """The numbers (B,) of a term for image files and their prompts, on the CPU."""
        if term.is_function:
            return call_function(term.what, paths, prompts, self.folder / "cache")
        if term.is_model:
            own = term.what == LEARNED
            model = load_reward(self.folder / "reward" if own else Path(term.what), self.device)
            source = self.settings["clip"] if own else model.config.get("clip")
            return model(*self._embedded(source, paths, prompts)).cpu()
        return torch.cosine_similarity(*self._embedded(self._source(term), paths, prompts)).cpu()

    def _embedded(self, source: str | None, paths: Sequence[Path], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """CLIP embeddings of images and of their prompts, both (B,E)."""
        clip = self.clip(source)
        name = "features" if source == self.settings["clip"] else f"features-{clip_digest(clip).hex()[:8]}"
        row = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        images, texts = features(self.folder / "cache" / f"{name}.safetensors", clip, paths, list(row))
        return images.to(self.device), texts[[row[text] for text in prompts]].to(self.device)


# ------------------------------------------------------------------------------------------------------- to [0,1]
def scale_of(term: Term, raw: Tensor, prompts: Sequence[str], labels: Mapping[int, float]) -> dict[str, Any]:
    """How the numbers (B,) of a term come to [0,1]: `how`, and a and b where it was fitted.

    labels: by row, of those that may be learned from. InputError where nothing can be said, or the labels contradict.
    """
    if term.is_model or (term.is_function and bool(((raw >= 0) & (raw <= 1)).all())):
        return {"how": AS_IT_IS}
    rows = sorted(labels)
    if len(rows) >= FEWEST and len({labels[i] > 0.5 for i in rows}) == 2:
        a, b = platt(raw[rows], torch.tensor([labels[i] for i in rows]))
        if a <= 0:
            raise InputError(
                f"--reward {term.what}: by {len(rows)} labels of the run a higher number is no better; accepted: "
                "another reward, or more labels"
            )
        return {"how": FITTED, "a": a, "b": b}
    if len(set(prompts)) == len(prompts):
        raise InputError(
            f"--reward {term.what}: numbers that are not in [0,1] need labels to be fitted to ({FEWEST} of both "
            "kinds), or several images of a prompt to be ranked among"
        )
    return {"how": RANKED}


def to_unit(raw: Tensor, prompts: Sequence[str], scale: Mapping[str, Any]) -> Tensor:
    """Numbers (B,) of images brought to [0,1] by a `scale_of`, in float32."""
    if scale["how"] == FITTED:
        return (scale["a"] * raw.double() + scale["b"]).sigmoid().float()
    return rank_within(raw, prompts) if scale["how"] == RANKED else raw.float().clamp(0, 1)


def rank_within(score: Tensor, prompts: Sequence[str]) -> Tensor:
    """The fraction (B,) of the images of its prompt that an image scores above, equal ones and itself counting half.

    The mean over the images of a prompt is 1/2, whatever their number.
    """
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    rank = torch.empty(len(score))
    for same in rows.values():
        own = score[same]
        _, place, count = torch.unique(own, return_inverse=True, return_counts=True)
        rank[same] = ((count.cumsum(0) - count / 2) / len(same))[place].float()
    return rank


def weighted(terms: Sequence[Term], rewards: Sequence[Tensor]) -> Tensor:
    """sum_i w_i r_i / sum_i w_i of the rewards r_i (B,) of the terms."""
    total = sum(term.weight for term in terms)
    return torch.stack([term.weight / total * reward for term, reward in zip(terms, rewards)]).sum(0)


def score_images(
    rewards: Rewards, paths: Sequence[Path], prompts: Sequence[str], labels: Mapping[int, float], split: Split,
    compared: Mapping[str, Sequence[Compared]],
) -> tuple[Tensor, list[dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """Rewards (N,) of a run's images, how each term came to [0,1], and how well they predict held-out feedback.

    labels: by row, of which those in `split.learn` may be fitted to; the others are held out. compared: by SUBSETS.
    """
    of_terms, said = [], []
    for term in rewards.terms:
        raw = rewards.raw(term, paths, prompts)
        scale = scale_of(term, raw, prompts, {i: labels[i] for i in split.learn})
        of_terms.append(to_unit(raw, prompts, scale))
        said.append({"what": term.what, "weight": term.weight, **scale})
    reward = weighted(rewards.terms, of_terms)
    quality = {
        subset: measure(reward[rows], torch.tensor([labels[i] for i in rows]))
        for subset, rows in split.held_out.items()
    }
    for subset in [subset for subset in SUBSETS if compared.get(subset)]:
        first, second, preferred = map(list, zip(*compared[subset]))
        right = ranked_right(reward[first], reward[second], torch.tensor(preferred))
        quality.setdefault(subset, {})["pairs_ranked_right"] = right
    return reward, said, quality


def scorer(
    folder: Path, settings: Mapping[str, Any], device: torch.device, named: bool
) -> Callable[[Sequence[Path], Sequence[str]], Tensor] | None:
    """What scores other images as a run's own were scored; None where ranks were, which other images do not have."""
    said = read_json(folder / "reward" / "held_out.json")["terms"]
    if any(one["how"] == RANKED for one in said):
        return None
    rewards = Rewards(folder, settings, device)
    check_terms(rewards.terms, named)

    def score(paths: Sequence[Path], prompts: Sequence[str]) -> Tensor:
        raw = (rewards.raw(term, paths, prompts) for term in rewards.terms)
        return weighted(rewards.terms, [to_unit(numbers, prompts, one) for numbers, one in zip(raw, said)])

    return score
