"""Files read whole, with one clear line where they cannot be, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "pickled weights can run code and are refused; convert them with diffusers or transformers: load them there "
    "(from_pretrained, from_single_file or load_lora_weights) and call save_pretrained(folder, "
    "safe_serialization=True) or save_lora_weights"
)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and says what is accepted."""


# what nonsense in a config raises
MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, MemoryError)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------- reading
def read_bytes(path: Path) -> bytes:
    """A file's content; InputError names a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint or a run."""
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped into memory, so that reading them is left to their first use."""
    if path.suffix in PICKLES:
        raise InputError(f"{path}: {CONVERT}")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, *MALFORMED) as error:
        raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- writing
UNFINISHED = re.compile(r"\.(?P<name>.+)\.minialign-(?P<process>[0-9]+)-[0-9a-f]{8}\.(?P<kind>tmp|old)", re.S)


def temporary_name(path: Path, kind: str = "tmp") -> Path:
    """A hidden name beside `path` that nobody has; it tells `remove_unfinished` which process gave it."""
    return path.with_name(f".{path.name}.minialign-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


@contextmanager
def atomic(path: Path, *, replace_folder: str | None = None) -> Iterator[Path]:
    """A temporary path to write a file to, of the same name; flushed and renamed to `path` at the end.

    A killed process leaves the old content or the new, never a part. A file never takes a folder's place. Where `path`
    is a link, the link is replaced and what it points to stays.

    With `replace_folder`, the temporary path is an empty folder to write files to. It takes the place of a folder only
    where that is empty or holds a file of this name, which says what it is; where `path` is a link, of the folder that
    it points to. A process killed between two renames leaves the old folder for `remove_unfinished` to put back.

    InputError names a `path` that must not be replaced; OSError of the system names `path`, not the temporary one.
    """
    place = path if replace_folder is None else Path(os.path.realpath(path))
    if replace_folder is None and path.is_dir():
        raise InputError(f"{path}: is a folder; accepted: the name of a file")
    if replace_folder is not None and place.exists() and not _is_replaceable(place, replace_folder):
        raise InputError(f"{path}: is there and holds no {replace_folder}; accepted: an empty folder or a new name")
    beside = temporary_name(place)  # a folder: libraries have temporary files of their own
    temporary = beside / path.name if replace_folder is None else beside
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            flush(file)
        flush(temporary)
        if place.is_dir():  # a folder cannot be replaced in one step: move the old one aside first
            old = temporary_name(place, "old")
            os.replace(place, old)
            os.replace(temporary, place)
            shutil.rmtree(old)
        else:
            os.replace(temporary, place)
        flush(place.parent)
    except OSError as error:
        if error.errno is None:  # no error of the system
            raise
        named = str(error.filename or path).replace(str(temporary), str(path)).replace(str(beside), str(path))
        raise OSError(error.errno, error.strerror, named) from error
    except SafetensorError as error:
        number = re.search(r"os error ([0-9]+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        remove(beside)


def _is_replaceable(folder: Path, known: str) -> bool:
    return folder.is_dir() and ((folder / known).is_file() or not any(folder.iterdir()))


def remove_unfinished(*places: Path) -> None:
    """Remove what killed processes were writing by `atomic` in these folders; put back a folder that was moved aside.

    Only names that `temporary_name` gives count, of processes that do not run any more, and only in the folders
    themselves, not in those below; of a place that is a link, in and beside the folder that it points to.
    """
    for place in places:
        target = Path(os.path.realpath(place))
        paths = list(target.iterdir()) if target.is_dir() else []
        if place.is_symlink() and target.parent.is_dir():
            paths += [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.minialign-")]
        for path in paths:
            match = UNFINISHED.fullmatch(path.name)
            if match is None or _runs(int(match["process"])):
                continue
            before = path.with_name(match["name"])
            if match["kind"] == "old" and not before.exists():
                os.replace(path, before)
            else:
                remove(path)


def _runs(process: int) -> bool:
    """Whether another process with this number runs (a number of our own is an earlier process, as in containers)."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link (what it points to stays) or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, by `atomic`; ValueError where it holds a number that JSON has not, such as infinity."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, by `atomic`."""
    with atomic(path) as temporary:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary, metadata)
        # safetensors makes it readable by its owner alone; as other files, it is to be what the umask says
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)
