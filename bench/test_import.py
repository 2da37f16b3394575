"""What importing minialign costs over importing torch, each in a fresh interpreter: pytest bench/test_import.py"""

import subprocess
import sys

import pytest


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("module", ["torch", "minialign"])
def test_import(benchmark, module):
    benchmark.group = "import in a fresh interpreter"
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", f"import {module}"],), {"check": True}, rounds=5)
