"""The main job as a user runs it, whole, with its goals: slow, run by `pytest -m slow`."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main") / "run"
    command = [sys.executable, "-m", "minialign.finetune", "--out", str(folder), "--seed", "21"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["overall", "seen", "unseen"])
def test_the_default_run_raises_alignment_by_20_points(run, name):
    alignment = json.loads((run / "results.json").read_text())["alignment"]
    assert alignment["after"][name] - alignment["before"][name] >= 0.20


def test_the_default_run_starts_from_clean_half_aligned_images_and_reports(run):
    results = json.loads((run / "results.json").read_text())
    assert 0.40 <= results["alignment"]["before"]["overall"] <= 0.65
    assert results["counts"]["evaluated"] >= 400
    assert all(low > 0 for low, _ in (results["alignment"]["ci95"]["gain"][k] for k in ("overall", "seen", "unseen")))
    assert min(results["readable"].values()) > 0.9
    report = (run / "report.html").read_text()
    assert "simulated" in report and f"{results['alignment']['after']['overall']:.1%}" in report
