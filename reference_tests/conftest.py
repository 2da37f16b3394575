"""Fixtures that several test modules share. What is slow to import waits for them: `pytest --help` reads this file."""

import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks are tiny, and threads of tests that run side by side wait for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `labelled_drawings` makes, to be copied and not changed."""
    from helpers import labelled_drawings

    return labelled_drawings(tmp_path_factory.mktemp("drawings") / "run")


@pytest.fixture
def labelled_run(drawings: Path, tmp_path: Path) -> Path:
    """A run of 48 drawings that show their prompt or another one; all but four are labelled as they are."""
    return Path(shutil.copytree(drawings, tmp_path / "run"))


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without matplotlib: no figure is drawn, which would take a third of a small job's time."""
    for name in [*(name for name in sys.modules if name.split(".")[0] == "matplotlib"), "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
