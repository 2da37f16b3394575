"""What every command line shares: one clear line and exit code 2 for a user's mistake, flags checked for range."""

from __future__ import annotations

import argparse
import errno
import math
import sqlite3
import sys
from collections.abc import Callable
from typing import NoReturn

from safetensors import SafetensorError

from .models.pretrained import InputError, first_line
from .training import Terminated

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GO_ON = "the same command (without --fresh) goes on from the last checkpoint"


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
    except (OSError, SafetensorError, sqlite3.OperationalError) as error:  # of writing: reading raises InputError
        full = error.errno in NO_SPACE if isinstance(error, OSError) else "disk" in str(error)
        if not full and not isinstance(error, SafetensorError):
            raise
        print(f"error: cannot be written: {first_line(error)}; once there is space, {GO_ON}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {GO_ON}", file=sys.stderr)
        sys.exit(130)  # 128 + the signal's number, as shells say it
    except Terminated as error:
        print(f"\n{error}: {GO_ON}", file=sys.stderr)
        sys.exit(143)
    sys.exit(0)
