"""The house's rules, held by reading the imports of its source: who may know whom, how long a function may be."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
CORE = ("__init__", "loss", "diffusion", "prompts", "pipeline", "measures", "files", "models")
STAGES = ("generate", "label", "reward", "finetune", "evaluate", "study")  # in the order of the method
CARRIERS = ("engine", "data", "feedback", "pages")
WORLD, DOOR = "shapes", "shapes.world"
MAIN_JOB = "finetune.__main__"  # the stages one after the other
LIBRARIES = {"torch", "numpy", "PIL", "safetensors", "huggingface_hub"}  # of the core
LONGEST_FUNCTION, LONGEST_STAGE = 60, 250  # lines; a longer stage is a folder


class Import(NamedTuple):
    """`name` (None: all of it) that `module` imports from `source`, a module of the package or a library's name."""

    module: str
    source: str
    name: str | None
    ours: bool
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.source}{f'.{self.name}' if self.name else ''}"


@cache
def modules() -> dict[str, Path]:
    """The package's files by their names within it, such as "engine.run"; folders by their own, and __init__."""
    found = {}
    for path in sorted((ROOT / "minialign").rglob("*.py")):
        parts = path.relative_to(ROOT / "minialign").with_suffix("").parts
        found[".".join(parts if parts == ("__init__",) or parts[-1] != "__init__" else parts[:-1])] = path
    return found


def part(module: str) -> str:
    """What stands at the top of the package: a file or a folder."""
    return module.split(".")[0]


def resolved(module: str, path: Path, node: ast.ImportFrom) -> str | None:
    """The module of the package, by its name within it, that an import is from; None where it is a library's."""
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        package = [] if module == "__init__" else package
        base = package[: len(package) - node.level + 1]
        return ".".join([*base, *(node.module or "").split(".")]).strip(".") or "__init__"
    if node.module and node.module.split(".")[0] == "minialign":
        return ".".join(node.module.split(".")[1:]) or "__init__"
    return None


@cache
def imports() -> list[Import]:
    """All imports of the package, those inside functions included."""
    found = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top, _, rest = alias.name.partition(".")
                    ours = top == "minialign"
                    found.append(Import(module, (rest or "__init__") if ours else top, None, ours, node.lineno))
            elif isinstance(node, ast.ImportFrom):
                source = resolved(module, path, node)
                for alias in node.names:
                    inner = alias.name if source == "__init__" else f"{source}.{alias.name}"
                    if source is None:
                        library = str(node.module).split(".")[0]
                        found.append(Import(module, library, alias.name, False, node.lineno))
                    elif inner in modules():
                        found.append(Import(module, inner, None, True, node.lineno))
                    else:
                        found.append(Import(module, source, alias.name, True, node.lineno))
    return found


def of(*parts: str) -> Iterator[Import]:
    return (found for found in imports() if part(found.module) in parts)


def test_the_reading_of_imports_is_right():
    """On what every version of the house has."""
    assert {"__init__", "loss", "models", "models.unet", "engine.commands"} <= modules().keys()
    known = {(found.module, found.source, found.name) for found in imports()}
    for expected in (
        ("__init__", "loss", "reward_weighted_loss"),
        ("pipeline", "models.unet", "UNet"),
        ("pipeline", "models.original", None),
        ("models.unet", "torch", None),
        ("engine.checkpoints", "files", "InputError"),
        ("engine.checkpoints", "torch", "checkpoint"),  # inside a function
    ):
        assert expected in known, expected
    assert all(found.source in modules() for found in imports() if found.ours)


def test_every_file_has_its_place():
    assert {part(module) for module in modules()} <= {*CORE, *STAGES, *CARRIERS, WORLD}
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    expected = {
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
        "README.md",
        "minialign",
        "reference_tests",
        "bench",
        "docs",
    }
    made = {"runs", "build", "dist", "minialign.egg-info"}  # by commands and installations, never committed
    assert top - made == expected


def test_only_what_ci_runs_is_classified():
    project, ci = ((ROOT / name).read_text() for name in ("pyproject.toml", ".github/workflows/ci.yml"))
    classified = re.findall(r'"(?:Programming Language :: Python|Operating System) :: (.*)"', project)
    assert "bash .ci/run" in ci and "runs-on: ubuntu" in ci
    assert sorted(classified) == sorted(["POSIX :: Linux", *re.findall(r"python:(3\.\d+)", ci)])


def test_the_core_imports_only_the_core():
    wrong = [str(found) for found in of(*CORE) if found.ours and part(found.source) not in CORE]
    libraries = LIBRARIES | set(sys.stdlib_module_names)
    wrong += [str(found) for found in of(*CORE) if not found.ours and found.source not in libraries]
    wrong += [str(found) for found in of("loss") if found.source not in ("__future__", "typing", "torch")]
    wrong += [str(found) for found in of("prompts") if found.source not in sys.stdlib_module_names]
    assert wrong == []


def test_what_carries_the_stages_knows_none_of_them():
    assert [str(found) for found in of(*CARRIERS) if found.ours and part(found.source) in STAGES] == []


def test_a_stage_knows_only_what_earlier_ones_offer():
    wrong = []
    for found in of(*STAGES):
        here, there = part(found.module), part(found.source)
        if found.ours and there in STAGES and there != here:
            later = STAGES.index(there) > STAGES.index(here) and found.module != MAIN_JOB
            private = any(name.startswith("_") for name in (*found.source.split("."), found.name or ""))
            private = private and (found.source, found.name) != (MAIN_JOB, "main_job")  # which the study repeats
            wrong += [str(found)] * (later or private)
    assert wrong == []


def test_nobody_takes_what_another_module_keeps_to_itself():
    private = [found for found in imports() if found.ours and (found.name or "").startswith("_")]
    assert [str(found) for found in private if found.name != "__version__"] == []


def test_the_embedded_world_has_one_door_and_stages_alone_open_it():
    names = [found for found in imports() if found.ours and part(found.source) == WORLD != part(found.module)]
    assert [str(found) for found in names if found.source != DOOR or part(found.module) not in STAGES] == []


def test_imports_go_in_no_circle():
    known: dict[str, set[str]] = {module: set() for module in modules()}
    for found in imports():
        if found.ours and found.source != found.module:
            known[found.module].add(found.source)
    while ends := [module for module, sources in known.items() if not sources & known.keys()]:
        for module in ends:
            del known[module]
    assert {module: sorted(sources & known.keys()) for module, sources in known.items()} == {}


def test_a_stage_is_a_short_file_or_a_folder():
    for stage in STAGES:
        if stage in modules() and modules()[stage].name == "__init__.py":
            assert f"{stage}.__main__" in modules(), stage
        elif stage in modules():
            lines = len(modules()[stage].read_text(encoding="utf-8").splitlines())
            assert lines <= LONGEST_STAGE, f"{stage}.py has {lines} lines"


def test_functions_are_short():
    wrong = {}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    wrong[f"{module}.{node.name}"] = lines
    assert wrong == {}


@pytest.mark.parametrize("path", sorted((ROOT / "reference_tests").glob("test_*.py")), ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    taken = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            taken += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            taken.append(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("importorskip", "import_module"):
            taken += [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
    assert [name for name in taken if name.startswith("test_")] == []
