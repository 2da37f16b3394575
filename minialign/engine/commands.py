"""What all commands share: a parser, ranges of flags, numbers in words, and one line with exit code 2 for a mistake."""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import re
import sqlite3
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from safetensors import SafetensorError

from ..files import InputError, first_line
from .optimising import Terminated

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GO_ON = "the same command (without --fresh) continues from the last checkpoint"
ELSEWHERE = {  # diffusers' and others' names of flags
    "--pretrained-model-name-or-path": "--model",
    "--train-data-dir": "--pretrain",
    "--output-dir": "--out",
    "--max-train-steps": "--steps",
    "--train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--accumulate",
    "--mixed-precision": "--dtype",
    "--lr": "--learning-rate",
    "--lr-scheduler": "--lr-schedule",
    "--lr-warmup-steps": "--warmup",
    "--max-grad-norm": "--clip-norm",
    "--use-ema": "--ema",
    "--snr-gamma": "--min-snr",
    "--proportion-empty-prompts": "--prompt-dropout",
    "--rank": "--lora",
    "--checkpointing-steps": "--checkpoint-every",
    "--checkpoints-total-limit": "--keep",
    "--num-inference-steps": "--sampling-steps",
    "--guidance-scale": "--guidance",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; flags are whole, with underscores or hyphens."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self._positionals.title, self._optionals.title = "folder", "run"  # groups of --help, before those of the stages
        self._negative_number_matcher = re.compile(r"-\.?\d")  # no flag begins so: --scale -1,1 is a flag and its value

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains every flag)\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore  # what all parsing goes through
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._known, words[:end]), *words[end:]], namespace)

    def _known(self, word: str) -> str:
        """A word of the command line, flags spelled as in the parser; the error for an unknown one suggests another."""
        if not re.match("--?[A-Za-z]", word) or " " in word:
            return word
        flag, equals, value = word.partition("=")
        name = flag.replace("_", "-")
        if name in self._option_string_actions:
            return name + equals + value
        meant = ELSEWHERE.get(name)
        if meant not in self._option_string_actions:
            meant = next(iter(difflib.get_close_matches(name, self._option_string_actions)), None)
        self.error(f"{flag}: no such flag" + (f"; did you mean {meant}?" if meant else ""))


def in_range(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: a number of `kind` from low to high."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            right = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            right = False
        if not right:
            what = "a whole number" if kind is int else "a number"
            accepted = f"from {low} up" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}; accepted: {what} {accepted}")
        return value

    return convert


def plural(value: int, what: str) -> str:
    """A number of things in words: 1 label, 2,000 labels."""
    return f"{value:,} {what}{'s' * (value != 1)}"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function; an error of the user or the system is one line on stderr, with exit code 2.

    An interruption exits with 130, SIGTERM with 143 (128 + the signal's number, as shells say it).
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted: {GO_ON}", file=sys.stderr)
        sys.exit(130)
    except Terminated as error:
        print(f"\n{error}: {GO_ON}", file=sys.stderr)
        sys.exit(143)
    except Exception as error:
        line = error_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Under torchrun torch's own threads sometimes abort a process while the interpreter exits, and torchrun would
        # report a failed job although everything is written: the process ends here instead.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(0)


def error_line(error: Exception) -> str | None:
    """An error as one line for the user; None for an error in this program.

    Files are checked where they are read, which raises InputError; the other errors of the system come from writing.
    """
    space = f"; once there is space, {GO_ON}"
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in NO_SPACE:
            return f"{place}cannot be written ({error.strerror}){space}"
        return f"{place}{error.strerror}"
    if isinstance(error, SafetensorError):
        return f"cannot be written ({first_line(error)}){space}"
    if isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError:
        if re.search("locked|busy", str(error)):
            return f"feedback.sqlite: in use by another program ({error}); accepted: the same command after that"
        return f"feedback.sqlite: cannot be used ({error}){space * ('full' in str(error))}"
    return None
