"""What every command line shares: one clear line and exit code 2 for a user's mistake, flags checked for range."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from .models.pretrained import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains every flag)\n")


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


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's main function; InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command (without --fresh) goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
