"""docs/minimal.py, the method on one page: it is short, needs only public names, and raises alignment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minialign

PAGE = Path(__file__).parent.parent / "docs" / "minimal.py"


def test_the_page_is_short_flat_and_uses_public_names():
    """At most 200 lines, no class, no command line; imports of torch, random, public names and the world alone."""
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 200
    taken = set()
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.ClassDef)
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            taken |= {f"{node.module}.{alias.name}" for alias in node.names}
    public = {f"minialign.{name}" for name in minialign.__all__}
    assert taken <= {"random", "torch", "torch.nn.functional", "minialign.shapes.world", *public}


@pytest.mark.slow
def test_the_page_gains_15_points():
    done = subprocess.run([sys.executable, PAGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gain = re.search(r"^all prompts .* ([+-][\d.]+) points$", done.stdout, re.M)
    assert gain and float(gain[1]) >= 15, done.stdout
