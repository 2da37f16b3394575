"""The folder of a run: its settings, its stages and what each was made from, its lock, its logs.

Every stage reads the results of earlier stages from the folder and adds its own. stages.json has for each stage how
often it was begun, the seconds that it took when it is finished, and everything that its result depends on
(`made_from`): settings, and digests of files. A finished stage is not repeated. One whose settings or files have
changed since is out of date; only --redo repeats it.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import __version__
from ..feedback import SIMULATED, FeedbackStore
from ..files import InputError, atomic, checksum, first_line, read_bytes, read_json, remove_unfinished, write_json
from .processes import barrier, gathered, is_main_process, say
from .settings import BY_NAME, RECIPES, RENAMED, STAGES, defaults

FORMAT = 2  # of a run's folder: another is refused
DIGEST = "digest:"  # begins a value of `made_from` that stands for content
OUTPUTS = {  # what each stage writes into the folder of a run, as patterns
    "generate": (),  # its images are those that the store names
    "label": (),
    "reward": (
        "reward/config.json", "reward/model.safetensors", "reward/held_out.json", "reward/README.md",
        "reward/calibration.png", "cache/rewards.safetensors", "tensorboard/reward/events.*",
    ),
    "finetune": (
        *(f"checkpoints/{step}[0-9]*/{name}" for step in ("step-", "damaged-step-")
          for name in ("shard-*", "SHA256SUMS")),
        *(f"model/{name}" for name in ("model_index.json", "*/*.json", "*/merges.txt", "*/*.safetensors")),
        "lora.safetensors", "validation/step-[0-9]*.png", "tensorboard/finetune/events.*", "skipped*.jsonl",
    ),
    "evaluate": ("best-of-n.png",),
}  # fmt: skip
OTHER_OUTPUTS = (  # of no single stage: images of comparisons, caches, logs; at the end the files that make it a run
    *(f"compare/*/{name}" for name in ("config.json", "feedback.sqlite*", ".lock")), "model/README.md",
    *(f"cache/{name}" for name in ("features*.safetensors", "scores-*.safetensors")),
    *(f"cache/{name}" for name in ("entries-*.safetensors", "entries-*.bad")),
    "cache/skipped*.jsonl", "results.json", "report.html", "feedback.sqlite*", "metrics.jsonl", "stages.json",
    "config.json",
)  # fmt: skip
FOLDERS = ("cache", "checkpoints", "images", "reward", "compare", "model", "validation")  # in which a run writes
REDO = "--redo does it again; `finetune RUN --redo` also redoes the later stages"


class Busy(InputError):
    """A run that another process is using."""


class Run:
    """A run's folder. `settings` are those in its config.json; `world` is that of its model, "" for none."""

    def __init__(self, folder: Path):
        self.folder = folder
        config, stages = folder / "config.json", folder / "stages.json"
        self.config: dict[str, Any] = read_json(config) if config.exists() else {}
        self.stages: dict[str, dict[str, Any]] = read_json(stages) if stages.exists() else {}
        if self.config and self.config.get("format") != FORMAT:
            raise InputError(f"{folder}: not a run of this version; accepted: another folder, or --fresh in this one")
        known = self.config.get("settings", {})
        known = {RENAMED.get(key, key): known[key] for key in known} if isinstance(known, dict) else None
        if known is None or not known.keys() <= BY_NAME.keys():
            raise InputError(f"{config}: settings are damaged; accepted: another folder, or --fresh in this one")
        if not all(_is_state(state) for state in self.stages.values()):
            raise InputError(f"{stages}: damaged; accepted: another folder, or --fresh in this one")
        self.settings: dict[str, Any] = known

    @property
    def world(self) -> str:
        return self.config.get("world", "")

    def remember(self, settings: Mapping[str, Any] | None = None, **facts: Any) -> None:
        """Write settings, and facts beside them, to config.json."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        made_by = {"minialign": __version__, "versions": versions, "threads": torch.get_num_threads()}
        self.settings |= settings or {}
        self.config = {"format": FORMAT, **made_by} | self.config | facts | {"settings": dict(self.settings)}
        if is_main_process():
            write_json(self.folder / "config.json", self.config)

    def resolve(self, given: Mapping[str, Any], bundled: bool, recipe: str | None = None) -> dict[str, Any]:
        """The value of every setting: what is given, else remembered, else the default of the run's world.

        A recipe counts as given flags, which flags that are really given override.
        """
        return defaults(bundled) | self.settings | self.given(given, recipe)

    def given(self, flags: Mapping[str, Any], recipe: str | None) -> dict[str, Any]:
        """The settings of a command line: its flags, and those of its recipe that no flag overrides."""
        return RECIPES.get(recipe or "", {}) | dict(flags)

    def intend(self, given: Mapping[str, Any]) -> None:
        """Write the given settings of stages that have not begun to config.json, for when the run is continued."""
        coming = {key: value for key, value in given.items() if not set(BY_NAME[key].stages) & self.stages.keys()}
        self.remember(coming)

    def source(self, name: str, given: Mapping[str, Any]) -> str | None:
        """The value of a setting that names a file, a folder or a hub id: the given one, else that of config.json."""
        return given.get(name, self.settings.get(name))

    # ---------------------------------------------------------------------------------------------------- the stages
    @contextmanager
    def stage(
        self,
        name: str,
        why: str,
        settings: Mapping[str, Any],
        inputs: Callable[[], Mapping[str, str]],
        *,
        redo: bool = False,
        together: bool = False,
    ) -> Iterator[bool]:
        """Announce a stage; yields True where its work is to be done: in the main process, or in all if `together`.

        settings: of the run; the result depends on those of the stage and on the digests that `inputs` computes.
        InputError where there is a result of other settings or inputs, unless `redo` removes it first. The context ends
        with a barrier.
        """
        own = {key: settings[key] for key in settings if name in BY_NAME[key].stages}
        plan = gathered(self._plan(name, own, inputs, redo) if is_main_process() else None)[0]
        if isinstance(plan, str):
            raise InputError(plan)
        self.settings |= own
        if not plan:
            say(f"{name}: done before ({self.stages[name]['seconds']:.0f} s)")
            yield False
            return
        say(f"{name}: {why}")
        begin = time.perf_counter()
        yield together or is_main_process()
        barrier()
        self._finish(name, time.perf_counter() - begin)

    def _plan(self, name: str, own: dict[str, Any], inputs: Callable[[], Mapping[str, str]], redo: bool) -> bool | str:
        """True if the stage has to run (and has begun), False if it is done, or a line that says why it cannot run."""
        try:
            made_from = {key: value for key, value in own.items() if changes_result(key)} | dict(inputs())
            state = self.stages.get(name)
            if against := self._contradicted(name, own):
                return against
            if state is not None:
                changed = changes(state["made_from"], made_from)
                if changed and not redo:
                    return f"{self.folder}: stage {name} is out of date: {changed}; {REDO}"
                if changed:
                    self.clear(name)
                elif "seconds" in state:
                    self.remember(own)  # free settings may have changed
                    return False
            self.remember(own)
            state = self.stages.setdefault(name, {"begun": 0, "made_from": made_from})
            state["begun"] += 1
            write_json(self.folder / "stages.json", self.stages)
        except InputError as error:
            return str(error)
        return True

    def _contradicted(self, name: str, own: Mapping[str, Any]) -> str | None:
        """A line that says which earlier, finished stage was made with other values of the same settings; else None."""
        for earlier in STAGES[: STAGES.index(name)] if name in STAGES else ():
            was = self.stages.get(earlier, {})
            before = was.get("made_from", {})
            shared = {key: before[key] for key in own if key in before and changes_result(key)}
            if "seconds" in was and (changed := changes(shared, {key: own[key] for key in shared})):
                return (
                    f"{self.folder}: stage {earlier} was made with another value: {changed}; accepted: the same value, "
                    f"or first python -m minialign.{earlier if earlier != 'label' else 'finetune'} with it and --redo"
                )
        return None

    def _finish(self, name: str, seconds: float) -> None:
        self.stages.setdefault(name, {})["seconds"] = round(seconds, 2)
        if is_main_process():
            write_json(self.folder / "stages.json", self.stages)

    def outdated(self, name: str, **inputs: str) -> str | None:
        """Which of these inputs of a stage have changed since it was done, in words; None where none has."""
        was = self.stages.get(name, {}).get("made_from", {})
        return changes({key: was[key] for key in inputs if key in was}, inputs) if was else None

    def clear(self, name: str) -> None:
        """Remove the result of a stage. InputError where that would remove labels by people."""
        if name in ("generate", "label") and (self.folder / "feedback.sqlite").exists():
            with closing(FeedbackStore(self.folder)) as store:
                refuse_people(self.folder, store, self.stages.get("label", {}).get("imported"))
        imported = "label file" in self.stages.get(name, {}).get("made_from", {})
        # without `made_from` the stage is neither done nor resumed, should the process be killed in between
        self.stages[name] = {"begun": self.stages.get(name, {}).get("begun", 0), "made_from": {}}
        write_json(self.folder / "stages.json", self.stages)
        card = self.folder / "model" / "README.md"
        if name == "finetune" and card.is_file():  # people edit it
            os.replace(card, self.folder / "model-card.old.md")
        left = remove_files(self.folder, OUTPUTS[name])
        if name in ("generate", "label"):
            left += self._remove_feedback(name == "generate", imported)
        if left:
            raise InputError(f"{self.folder}: cannot be removed: {', '.join(left[:3])}")
        self._forget_metrics(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Forget that a stage was begun, so that it can run with other settings."""
        del self.stages[name]
        write_json(self.folder / "stages.json", self.stages)

    def _remove_feedback(self, images: bool, imported: bool) -> list[str]:
        """Remove the labels and, with `images`, the sampled images; returns the paths that could not be removed."""
        if not (self.folder / "feedback.sqlite").exists():
            return []
        if images:
            return remove_sampled(self.folder) + remove_files(self.folder, ["feedback.sqlite*"])
        with closing(FeedbackStore(self.folder)) as store:
            store.remove_labels(imported)
        return []

    def _forget_metrics(self, stage: str) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [row for row in read_metrics(path) if row["stage"] != stage]
            with atomic(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    # ------------------------------------------------------------------------------------------------------ the logs
    def log(self, stage: str) -> Callable[[dict[str, Any]], None]:
        """A function that appends rows of a stage to metrics.jsonl, where a repeated step replaces its old row.

        It also writes them to tensorboard/ where TensorBoard is installed (the extra `tensorboard`).
        """
        path, board = self.folder / "metrics.jsonl", None

        def append(row: dict[str, Any]) -> None:
            nonlocal board
            if board is None:
                if path.exists():
                    old = read_metrics(path)
                    kept = [other for other in old if other["stage"] != stage or other["step"] < row["step"]]
                    with atomic(path) as temporary:
                        temporary.write_text("".join(json.dumps(other) + "\n" for other in kept), encoding="utf-8")
                board = open_board(self.folder / "tensorboard" / stage, row["step"])
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, **row}) + "\n")
            if board:
                for key in row.keys() - {"step"}:
                    board.add_scalar(key, row[key], row["step"])
                board.flush()

        return append if is_main_process() else lambda row: None


def changes_result(name: str) -> bool:
    """Whether the value of a setting changes the result. For a source its content does, which is among the inputs."""
    return not BY_NAME[name].free and not BY_NAME[name].source


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The differences between two `made_from` in words; None where there are none."""
    differences = []
    for key in dict.fromkeys((*was, *now)):
        a, b = was.get(key), now.get(key)
        if a != b:
            content = str(a).startswith(DIGEST) or str(b).startswith(DIGEST)
            name = key.replace("_", " ") if content else BY_NAME[key].flag if key in BY_NAME else key
            differences.append(f"the {name} changed" if content else f"{name} was {a}, now {b}")
    return "; ".join(differences) or None


def digest(*contents: bytes | str) -> str:
    """A value of `made_from` that stands for content."""
    hasher = hashlib.sha256()
    for content in contents:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        hasher.update(len(data).to_bytes(8, "little") + data)
    return DIGEST + hasher.hexdigest()[:24]


def label_digest(store: FeedbackStore) -> str:
    """`digest` of all labels and comparisons in a store."""
    return digest(json.dumps([store.label_rows(), store.comparison_rows()]))


def file_digest(path: Path) -> str:
    """`digest` of a file in the run; InputError names one that cannot be read."""
    try:
        return DIGEST + checksum(path)[:24]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a line that a killed process left incomplete."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({first_line(error)}); remove it to continue") from error
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "step"} <= row.keys():
            rows.append(row)
    return rows


def open_board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which drops what an interrupted run wrote from `step` on; False without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=step)


# ------------------------------------------------------------------------------------------------------- the folder
@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder. The main process holds the lock, which ends with that process."""
    if not is_main_process():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise Busy(f"{folder}: another process is at work on this run") from error


@contextmanager
def opened(folder: Path, fresh: bool = False) -> Iterator[Run]:
    """The run in a folder, new or continued, locked while the context lasts; `fresh` removes an earlier one first.

    A new folder is removed again if the work failed before anything was written.
    """
    check_folder(folder)
    if fresh and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise InputError("--fresh: each restart of --max-restarts would start over; use a new folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with locked(folder):
            barrier()  # all processes have checked the folder
            if is_main_process():
                if fresh:
                    remove_run(folder)
                remove_unfinished(folder, *(folder / name for name in FOLDERS))
            barrier()
            yield Run(folder)
    except BaseException:
        if made and is_main_process() and [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            for path in made:
                path.rmdir()
        raise


def check_folder(folder: Path) -> None:
    """InputError unless `folder` is a run, empty, or can be made."""
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
        names = [path.name for path in folder.iterdir()] if writable and place == folder else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror})") from error
    if not writable:
        raise InputError(f"{folder}: not a folder that can be written")
    if not is_run(folder) and any(name != ".lock" and not name.startswith(".") for name in names):
        raise InputError(f"{folder}: holds files that are not a run's; accepted: a run, or an empty or new folder")


def _is_state(state: Any) -> bool:
    """Whether an entry of stages.json is one that `Run` writes."""
    return isinstance(state, dict) and isinstance(state.get("begun"), int) and isinstance(state.get("made_from"), dict)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, damaged or not: its config.json, or a store that `label --import` began."""
    path = folder / "config.json"
    named = path.is_file() and (b'"minialign"' in read_bytes(path) or (folder / "stages.json").is_file())
    return named or (folder / "feedback.sqlite").is_file()


def refuse_people(folder: Path, store: FeedbackStore, imported: str | None = None) -> None:
    """InputError where the store has labels or comparisons by people, which no flag may delete.

    The simulated annotator's labels can be made again, and so can imported ones unless somebody changed them since:
    `imported` is the `label_digest` of the store after the import.
    """
    if imported is not None and label_digest(store) == imported:
        return
    names = [name for name in store.labellers() if name != SIMULATED]
    compared = store.comparison_rows()
    if names or compared:
        whose = f"labels by {', '.join(names)}" if names else f"{len(compared)} comparisons"
        raise InputError(
            f"{folder / 'feedback.sqlite'} holds {whose}; move it away first (python -m minialign.label "
            f"{folder} --export FILE keeps them in a file)"
        )


def remove_run(folder: Path) -> None:
    """Remove the files that a run wrote, and nothing else; files that stay are named on stderr.

    config.json is removed last, so that the folder is still a run if the process is killed. InputError where people
    have labelled or compared its images, or where a file cannot be removed.
    """
    imported = None
    with suppress(InputError, AttributeError):  # of any version, damaged or not
        imported = read_json(folder / "stages.json").get("label", {}).get("imported")
    places = [place for place in (folder, *folder.glob("compare/*")) if (place / "feedback.sqlite").is_file()]
    for place in places:
        with closing(_opened_store(place)) as store:
            refuse_people(place, store, imported if place == folder else None)
    left = [path for place in places for path in remove_sampled(place)]
    left += remove_files(folder, [*(pattern for stage in STAGES for pattern in OUTPUTS[stage]), *OTHER_OUTPUTS])
    if left:
        raise InputError(f"--fresh: cannot be removed: {', '.join(left[:3])}")
    kept = sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.is_dir() else []
    if kept:
        print(f"--fresh leaves what the run did not write: {', '.join(kept[:8])}", file=sys.stderr)


def _opened_store(place: Path) -> FeedbackStore:
    try:
        return FeedbackStore(place)
    except InputError as error:
        raise InputError(f"--fresh: {error}; move it away first") from error


def remove_sampled(folder: Path) -> list[str]:
    """Remove the sampled images that the store of a run names; returns the paths that could not be removed."""
    with closing(FeedbackStore(folder)) as store:
        files = store.sampled()
    names = [os.path.relpath(file, folder) for file in files]
    return remove_files(folder, [glob.escape(name) for name in names if not name.startswith("..")])


def remove_files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Remove the files in a folder that match, in the order of the patterns, and then the folders that are empty.

    Links to folders are followed. Returns the paths that could not be removed.
    """
    left: list[str] = []
    parents: dict[Path, None] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                parents[path] = None
                continue
            try:
                path.unlink()
                parents |= dict.fromkeys(parent for parent in path.parents if parent.is_relative_to(folder))
            except OSError as error:
                left.append(f"{path} ({first_line(error)})")
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        if parent != folder and parent.is_dir() and not parent.is_symlink() and not any(parent.iterdir()):
            parent.rmdir()
    return left
