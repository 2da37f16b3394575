"""The main job as a user runs it, whole, with its goals: slow, run by `pytest -m slow`."""

import json
import subprocess
import sys

import pytest

from minialign.pages import normal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main") / "run"
    command = [sys.executable, "-m", "minialign.finetune", "--out", str(folder), "--seed", "21"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def judged(run) -> dict[str, dict]:
    """What the annotator says of each model, by group of prompts."""
    return json.loads((run / "results.json").read_text())["evaluation"]["judged"]["simulated annotator"]


@pytest.mark.parametrize(
    "name, least", [("overall", 0.2), ("seen", 0.15), ("new combinations", 0.15), ("new objects", 0.15)]
)
def test_the_default_run_raises_alignment_by_20_points(run, name, least):
    found = judged(run)["fine-tuned"][name]
    assert found["gain"] >= least and found["gain_ci95"][0] > 0
    assert found["gain"] == pytest.approx(found["value"] - judged(run)["base"][name]["value"])


def test_the_default_run_starts_from_readable_images_and_reports(run):
    results, found = json.loads((run / "results.json").read_text()), judged(run)
    assert 0.35 <= found["base"]["overall"]["value"] <= 0.55
    assert results["counts"]["evaluated"] >= 400
    assert min(results["evaluation"]["readable"].values()) > 0.83
    report = (run / "report.html").read_text().replace("\N{NO-BREAK SPACE}%", "%")
    assert "simulated" in report and f"{found['fine-tuned']['overall']['value']:.1%}" in report


def test_fidelity_and_the_reward_are_measured_as_the_documents_say(run):
    """The images are near drawings of what they show; the reward model judges prompts that it has not seen."""
    results = json.loads((run / "results.json").read_text())
    assert max(results["evaluation"]["frechet"].values()) < 0.2
    assert results["reward"]["measured"]["auxiliary"]["new prompts"]["auc"] > 0.9


def test_the_band_of_normal_runs_is_of_this_model_and_its_defaults(run):
    if not normal.FILE.exists():
        pytest.skip("no normal.json; python -m minialign.pages.normal RUN RUN RUN makes it")
    report = (run / "report.html").read_text()
    assert "No bands of normal curves" not in report and "The bands hold all values" in report
    assert "the images changed more than" not in report
