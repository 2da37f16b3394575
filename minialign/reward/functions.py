"""A function of images and prompts as a reward: "module:function" or "FILE.py:function", loaded, called, checked."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..data import open_image
from ..engine.optimising import progress
from ..files import InputError, checksum, first_line, read_weights, write_tensors

BATCH = 32  # images that a function gets at once


def load_function(what: str) -> tuple[Callable[..., Any], Path]:
    """The function "module:function" or "FILE.py:function", and the file that it is in; this runs the file, once."""
    place, _, name = what.rpartition(":")
    try:
        module = _module(place, checksum(Path(place))) if place.endswith(".py") else importlib.import_module(place)
        function, file = getattr(module, name, None), Path(str(module.__file__))
    except (Exception, SystemExit) as error:  # a script that is not guarded by __name__ == "__main__" ends itself
        raise InputError(
            f"--reward {what}: cannot be loaded ({_reason(error)}); accepted: module:function or FILE.py:function"
        ) from error
    if not callable(function):
        problem = f"no function {name!r} in {file}"
        raise InputError(f"--reward {what}: {problem}; accepted: one of (images, prompts) that returns numbers")
    return function, file


@cache
def _module(place: str, content: str) -> ModuleType:
    """The module in a file, run once for each content that the file has."""
    spec = importlib.util.spec_from_file_location(f"reward_{content[:16]}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses, for one, look it up
    spec.loader.exec_module(module)
    return module


def call_function(what: str, paths: Sequence[Path], prompts: Sequence[str], cache_folder: Path) -> Tensor:
    """What a function says (B,) of image files for their prompts; it gets lists of PIL images and of strings.

    What it said is kept in scores-DIGEST.safetensors of the folder, by its file's content and its name: a killed
    process loses a minute's work at most. InputError where it fails, or does not return one finite number an image.
    """
    function, file = load_function(what)
    made_by = hashlib.sha256(f"{checksum(file)} {what.rpartition(':')[2]}".encode()).hexdigest()[:16]
    path, known = cache_folder / f"scores-{made_by}.safetensors", {}
    with suppress(InputError, KeyError):  # of a damaged file nothing is taken
        saved = read_weights(path) if path.exists() else {"keys": torch.empty(0), "scores": torch.empty(0)}
        known = dict(zip((key.tobytes() for key in saved["keys"].numpy()), saved["scores"].tolist()))
    keys = [hashlib.sha256(f"{checksum(place)} {prompt}".encode()).digest() for place, prompt in zip(paths, prompts)]
    missing = list({key: i for i, key in enumerate(keys) if key not in known}.values())
    last = time.monotonic()
    for start in progress(range(0, len(missing), BATCH), what) if missing else ():
        rows = missing[start : start + BATCH]
        numbers = _checked(what, function, [paths[i] for i in rows], [prompts[i] for i in rows])
        known.update(zip((keys[i] for i in rows), numbers.tolist()))
        if time.monotonic() - last > 60 or start + BATCH >= len(missing):
            table = torch.tensor([list(key) for key in known], dtype=torch.uint8)
            write_tensors(path, {"keys": table, "scores": torch.tensor(list(known.values()), dtype=torch.float64)})
            last = time.monotonic()
    return torch.tensor([known[key] for key in keys], dtype=torch.float64)


def _checked(what: str, function: Callable[..., Any], paths: Sequence[Path], prompts: Sequence[str]) -> Tensor:
    """The numbers (B,) of one call of a function."""
    images = [open_image(path) for path in paths]
    try:
        with torch.no_grad():
            numbers = torch.as_tensor(function(images, list(prompts))).detach().to("cpu", torch.float64).reshape(-1)
    except (Exception, SystemExit) as error:
        raise InputError(f"--reward {what}: failed on {paths[0]} ... ({_reason(error)})") from error
    if len(numbers) != len(paths):
        raise InputError(f"--reward {what}: {len(numbers)} numbers for {len(paths)} images; accepted: one for each")
    if not numbers.isfinite().all():
        wrong = int((~numbers.isfinite()).nonzero()[0])
        raise InputError(f"--reward {what}: {numbers[wrong]} for {paths[wrong]}; accepted: finite numbers")
    return numbers


def _reason(error: BaseException) -> str:
    """An error and where it was raised, unless that is here or in the system that imports modules."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith((str(Path(__file__).parents[1]), "<frozen importlib"))
    return f"{type(error).__name__}: {first_line(error)}" + ("" if ours else f", {last.filename}:{last.lineno}")
