"""What the reward knows of a run's images, for other trainers: a table, JSON lines, or folders by repeats.

    weight_i = r_i / mean_j r_j

A trainer that multiplies each image's loss by its weight computes the loss of Lee et al. 2023, section 3.3, for its own
images, divided by the mean reward: its mean weight is one, so that its learning rate keeps its meaning. A trainer that
knows only repeats meets an image in proportion to its reward, rounded to tenths, which has the same expectation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..feedback import FeedbackStore, StoredImage
from ..feedback.tables import write_rows
from ..files import InputError, atomic, read_weights

COLUMNS = ("image", "prompt", "reward", "weight")
FILES = (".csv", ".tsv", ".jsonl")  # any other name is that of a folder
REPEATS = 10  # of an image with reward 1
NAME = "reward"  # of the folders by repeats: 7_reward


def export_rewards(folder: Path, path: Path, rewards: Path) -> str:
    """Write the rewards of a run's images to `path`; what was written, in words. InputError where something is there.

    rewards: the file of the run's rewards, in the order of its images.
    """
    check_place(path)
    if not rewards.is_file():
        raise InputError(f"{folder}: no rewards yet; python -m minialign.reward {folder} makes them")
    store = FeedbackStore(folder, read_only=True)
    try:
        images, reward = store.images(), read_weights(rewards)["reward"].double()
    finally:
        store.close()
    if len(images) != len(reward):
        raise InputError(f"{rewards}: of {len(reward)} images, where the run has {len(images)}; learn the reward again")
    if not reward.any():
        raise InputError(f"{rewards}: no image has a reward above 0: nothing to learn from")
    return (write_table if path.suffix.lower() in FILES else write_folders)(images, reward, path)


def check_place(path: Path) -> None:
    """InputError where something is at `path` that an export would replace."""
    kind = path.suffix.lower()
    if kind not in FILES and kind[1:].isalpha() and not path.is_dir():
        raise InputError(f"--export {path}: accepted: a name that ends in {', '.join(FILES)}, or that of a folder")
    if path.is_file() or path.is_symlink() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"--export {path}: is there; accepted: a new name, or an empty folder")


def write_table(images: Sequence[StoredImage], reward: Tensor, path: Path) -> str:
    """A row of COLUMNS for each image; paths are relative to the file's folder."""
    places = (os.path.relpath(image.file, path.absolute().parent) for image in images)
    numbers = zip(reward.tolist(), (reward / reward.mean()).tolist())
    rows = ((place, image.prompt, round(r, 6), round(w, 6)) for place, image, (r, w) in zip(places, images, numbers))
    write_rows(path, COLUMNS, rows)
    return f"{len(images)} images"


def write_folders(images: Sequence[StoredImage], reward: Tensor, path: Path) -> str:
    """Copies of the images with their prompts beside them in N_reward/, N of REPEATS in proportion to the reward.

    Images that round to 0 are left out.
    """
    repeats = (REPEATS * reward).round().int().tolist()
    kept = [(i, number) for i, number in enumerate(repeats) if number]
    if not kept:
        raise InputError(f"--export {path}: all rewards round to 0 repeats; accepted: a name in {', '.join(FILES)}")
    with atomic(path, replace_folder="") as temporary:  # an empty one alone
        for i, number in kept:
            place = temporary / f"{number}_{NAME}"
            place.mkdir(exist_ok=True)
            shutil.copyfile(images[i].path, place / f"{i:06d}{images[i].path.suffix.lower()}")
            (place / f"{i:06d}.txt").write_text(images[i].prompt + "\n", encoding="utf-8")
    return f"{len(kept)} of {len(images)} images, {sum(repeats)} with their repeats"
