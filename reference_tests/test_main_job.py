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
    for name in ("overall", "seen", "unseen"):
        assert after[name] - before[name] >= 0.20, name
    assert results["counts"]["evaluated"] >= 400
    report = (tmp_path / "run" / "report.html").read_text()
    assert "simulated" in report and f"{after['overall']:.1%}" in report
