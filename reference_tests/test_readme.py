"""The README's and docs' promises: snippets run, links lead somewhere, importing is light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(snippet, page.name, "exec"), {})
    if page.name == "README.md":
        assert (tmp_path / "stars.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_flags_in_the_documents_exist():
    known = subprocess.run(
        [sys.executable, "-m", "minialign.finetune", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = [line for page in PAGES for line in re.findall(r"minialign\.finetune[^`\n#&]*", page.read_text())]
    assert commands
    for flag in {flag for line in commands for flag in re.findall(r"--[\w-]+", line)}:
        assert flag in known


def test_importing_brings_nothing_heavy():
    """What costs time to import beside torch is left until it is needed."""
    heavy = "huggingface_hub", "matplotlib", "diffusers", "transformers", "sqlite3"
    code = f"import minialign, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
