"""The main job as a user runs it, whole, with its goals: slow, run by `pytest -m slow`."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_default_run_raises_alignment_on_seen_and_unseen_prompts(tmp_path):
    command = [sys.executable, "-m", "minialign.finetune", "--out", str(tmp_path / "run"), "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    before, after = results["alignment"]["before"], results["alignment"]["after"]
    assert 0.40 <= before["overall"] <= 0.65
    # the goal is 20 points; one run's gain is known to 6 points, and to 10 of seen or unseen prompts alone
    for name in ("overall", "seen", "unseen"):
        low, high = results["alignment"]["ci95"]["gain"][name]
        assert low > 0.05 and high > 0.20 and after[name] - before[name] > 0.12, name
    assert results["readable"]["before"] > 0.9 and results["readable"]["after"] > 0.9
    assert results["counts"]["evaluated"] >= 400
    report = (tmp_path / "run" / "report.html").read_text()
    assert "simulated" in report and f"{after['overall']:.1%}" in report
