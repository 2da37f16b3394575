"""A function of images and prompts as a reward: "module:function" or "FILE.py:function", loaded, called, checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..data import open_image
from ..engine.optimising import progress
from ..files import InputError, checksum, first_line

BATCH = 32  # images that a function gets at once


def load_function(what: str) -> tuple[Callable[..., Any], Path]:
    """The function "module:function" or "FILE.py:function", and the file that it is in; this runs the file, once."""
    place, _, name = what.rpartition(":")
    try:
        module = _module(place, checksum(Path(place))) if place.endswith(".py") else importlib.import_module(place)
        function, file = getattr(module, name), Path(str(module.__file__))
    except Exception as error:
        raise InputError(
            f"--reward {what}: cannot be loaded ({_told(error)}); accepted: module:function or FILE.py:function"
        ) from error
    if not callable(function):
        raise InputError(f"--reward {what}: not a function; accepted: one of (images, prompts) that returns numbers")
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


def call_function(what: str, paths: Sequence[Path], prompts: Sequence[str]) -> Tensor:
    """What a function says (B,) of image files for their prompts; it gets lists of PIL images and of strings.

    InputError where it fails, or does not return one finite number for each image.
    """
    function, found = load_function(what)[0], []
    for start in progress(range(0, len(paths), BATCH), what):
        part = paths[start : start + BATCH]
        try:
            with torch.no_grad():
                numbers = function([open_image(path) for path in part], list(prompts[start : start + BATCH]))
            numbers = torch.as_tensor(numbers).detach().to("cpu", torch.float64).reshape(-1)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--reward {what}: failed on {part[0]} ... ({_told(error)})") from error
        if len(numbers) != len(part):
            raise InputError(f"--reward {what}: {len(numbers)} numbers for {len(part)} images; accepted: one for each")
        if not numbers.isfinite().all():
            wrong = int((~numbers.isfinite()).nonzero()[0])
            raise InputError(f"--reward {what}: {numbers[wrong]} for {part[wrong]}; accepted: finite numbers")
        found.append(numbers)
    return torch.cat(found) if found else torch.empty(0)


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)}, {last.filename}:{last.lineno}"
