"""Fixtures that several test modules share."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import labelled_drawings


def pytest_configure() -> None:
    """One thread: the networks are tiny, and threads of tests that run side by side wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `labelled_drawings` makes, to be copied and not changed."""
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
