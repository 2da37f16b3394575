"""The pages' promises: snippets run, links lead somewhere, code is quoted as it is, commands and files exist."""

import argparse
import ast
import json
import re
import runpy
import shlex
import shutil
import sqlite3
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import SMALL, pretraining_pairs
from helpers import flags as words_of
from torch.distributed.run import get_args_parser

import minialign
from minialign import reward_weighted_loss
from minialign.engine.settings import RECIPES, SETTINGS
from minialign.evaluate.__main__ import main as evaluate
from minialign.feedback import import_into_run
from minialign.finetune.__main__ import main as finetune
from minialign.generate import main as generate
from minialign.label.__main__ import main as label
from minialign.models.pretrained import EMBEDDED
from minialign.reward.__main__ import main as reward
from minialign.shapes import pretrain

sys.path.append(str(Path(__file__).parent.parent / "bench"))

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD, READING, FORMATS = (ROOT / "docs" / f"{name}.md" for name in ("method", "reading", "formats"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.M | re.S)
LINKED = re.compile(r"\[`?[\w./]+`?\]\(([\w./]+\.py)\)")


# ---------------------------------------------------------------------------------------------------- links and names
def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if page != METHOD], ids=lambda page: page.name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in snippets(page):
        if "diffusers" in snippet:
            pytest.importorskip("diffusers")
        exec(compile(snippet, page.name, "exec"), {})
    if page.name == "README.md":
        assert (tmp_path / "stars.png").exists()
    if page == FORMATS:  # its bytes of images are files now, and their pairs are read
        assert import_into_run(tmp_path / "run", tmp_path / "pick-a-pic" / "pairs.jsonl") == (0, 1)


@pytest.mark.parametrize("number", [0, 1], ids=["diffusers", "flow matching"])
def test_the_loss_in_another_trainer_is_the_formula(number, monkeypatch):
    """Both steps of each example of docs/embedding.md: the value, row by row in float64, and that weights move."""
    snippet, seen = snippets(ROOT / "docs" / "embedding.md")[number], []
    if number == 0:
        pytest.importorskip("diffusers")
        assert "UNet2DConditionModel(" in snippet and "noise_scheduler.add_noise(" in snippet

    def recorded(prediction, target, reward, pretrain, beta):
        loss = reward_weighted_loss(prediction, target, reward, pretrain, beta=beta)
        seen.append((prediction.detach().clone(), target.clone(), reward, pretrain, beta, loss.item()))
        return loss

    monkeypatch.setattr(minialign, "reward_weighted_loss", recorded)
    names: dict[str, Any] = {}
    exec(compile(snippet, "embedding.md", "exec"), names)
    for prediction, target, weight, is_pair, beta, loss in seen:
        errors = [float(((t.double() - p.double()) ** 2).mean()) for p, t in zip(prediction, target)]
        of_model = [float(r) * e for r, e, pair in zip(weight, errors, is_pair) if not pair]
        of_pairs = [beta * e for e, pair in zip(errors, is_pair) if pair]
        assert loss == pytest.approx(sum(of_model) / len(of_model) + sum(of_pairs) / len(of_pairs), rel=1e-5)
    assert len(seen) == 2 and seen[0][5] != seen[1][5]
    assert names["optimizer"].state_dict()["state"][0]["step"] == 2


def sections(page: Path) -> dict[str, str]:
    """A page's sections, those below them included, by the anchors that code hosts give their headings."""
    text = FENCE.sub(lambda fence: fence[0].replace("\n#", "\n "), page.read_text())  # a comment is no heading
    found = {}
    for heading in re.finditer(r"^(#+) (.+)$", text, re.M):
        end = re.search(rf"^#{{1,{len(heading[1])}}} ", text[heading.end() :], re.M)
        anchor = re.sub(r"[^\w\- ]", "", heading[2].lower()).replace(" ", "-")
        found[anchor] = text[heading.start() : heading.end() + end.start() if end else len(text)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_sections(page):
    wrong = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in sections(target)):
            wrong.append(link)
    assert wrong == []


@cache
def definitions(path: Path) -> dict[str, list[str]]:
    """The lines of every function, class and constant of a file by name, such as NoiseSchedule.add_noise."""
    lines, found = path.read_text().splitlines(), {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [name.id for target in targets if target for name in ast.walk(target) if hasattr(name, "id")]
            for name in names:
                found[prefix + name] = lines[node.lineno - 1 : node.end_lineno]
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(path.read_text()).body, "")
    return found


def test_the_method_quotes_the_code_as_it_is():
    """Every block of code stands, but for its indentation, in the function that is named above it."""
    text = METHOD.read_text()
    blocks = re.findall(r"^\[`([\w./]+)`\]\(([\w./]+)\) `([\w.]+)`\n\n```python\n(.*?)```", text, re.M | re.S)
    assert len(blocks) == text.count("```python") > 40
    for shown, link, name, code in blocks:
        assert link == f"../minialign/{shown}"
        lines, quoted = definitions(METHOD.parent / link).get(name, []), code.splitlines()
        parts = ("\n".join(lines[i : i + len(quoted)]) for i in range(len(lines)))
        assert any(textwrap.dedent(part) == "\n".join(quoted) for part in parts), f"{shown} {name} lacks:\n{code}"


def test_the_method_shows_no_equation_without_its_lines():
    kinds = re.findall(r"^(?:```(math|python)|(#+ ))", METHOD.read_text(), re.M)
    followed = [after for (kind, _), (after, _) in zip(kinds, kinds[1:]) if kind == "math"]
    assert followed == ["python"] * len(followed) and len(followed) > 30


def test_names_in_the_method_are_in_the_files_that_are_linked_before_them():
    for paragraph in FENCE.sub("", METHOD.read_text()).split("\n\n"):
        known: set[str] = set()
        for link, name in re.findall(rf"{LINKED.pattern}|`([A-Za-z_][\w.]*)`", paragraph):
            known |= definitions(METHOD.parent / link).keys() if link else set()
            assert link or name in known, f"{name} in:\n{paragraph}"


def test_the_reading_order_knows_every_file_and_where_its_equations_are():
    package, method = ROOT / "minialign", sections(METHOD)
    listed: set[str] = set()
    for row in re.findall(r"^\|.*\.py\).*\|$", READING.read_text(), re.M):
        what, equations = row.strip("|").rsplit("|", 1)
        files = re.findall(r"\(\.\./minialign/([\w./]+\.py)\)", what)
        listed |= set(files)
        for anchor in re.findall(r"\(method\.md#([\w-]+)\)", equations):
            shown = re.findall(r"\(\.\./minialign/([\w./]+)\)", method[anchor])
            assert set(files) & set(shown), f"{files} at method.md#{anchor}"
        assert ("method.md" in equations) == any(f"(../minialign/{file})" in METHOD.read_text() for file in files), row
    there = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("[!_]*.py")}
    assert {"reward/__init__.py", "evaluate/__init__.py"} < listed  # the stages that are functions
    assert {file for file in listed if "/__" not in file} == there.keys()
    named = {file for file, text in there.items() if re.search(r"\b(equation|eq\.|algorithm|figure) \d", text)}
    assert named and [file for file in named if f"(../minialign/{file})" not in METHOD.read_text()] == []


def test_the_lines_of_the_readme_are_counted():
    """In the table of what is minimal: of files, or of a folder's files of Python, else of all; rounded."""
    rows = re.findall(r"^\|.*\| (\[.*\)) \| ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) == 10
    seen: set[Path] = set()
    for places, told in rows:
        found = [ROOT / place for place in re.findall(r"\]\((.*?)\)", places)]
        inside = [[*place.rglob("*.py")] or [*place.glob("*")] or [place] for place in found]
        files = [file for files in inside for file in files]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(lines / int(told.replace(",", "")) - 1) < 0.1, f"{places}: {lines}"
        seen |= set(files)
    package = ROOT / "minialign"
    assert {*package.rglob("*.py"), *(package / "label" / "page").iterdir()} - seen == {package / "__init__.py"}


HEAVY = "huggingface_hub", "matplotlib", "diffusers", "transformers", "sqlite3"
IMPORTS = f"""if True:
    import importlib, sys
    for name in sys.argv[1:]:
        for module in [module for module in sys.modules if module.split(".")[0] == "minialign"]:
            del sys.modules[module]
        importlib.import_module(name)
        heavy = [module for module in {HEAVY} if module in sys.modules]
        print(name, sum(module.split(".")[0] == "minialign" for module in sys.modules), *heavy)"""


TOLD = re.findall(r"\| `([\w.]+)` \| (\d+) \|", READING.read_text())


@cache
def imported() -> dict[str, list[str]]:
    """By what is imported: how many modules of minialign that loads, and which of HEAVY are loaded by then."""
    command = [sys.executable, "-c", IMPORTS, "minialign", *(name for name, _ in TOLD)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: found for name, *found in map(str.split, done.stdout.splitlines())}


def test_what_an_import_loads_is_as_counted():
    """In the table of docs/reading.md, each import in a process that has loaded nothing of the package."""
    assert [(name, imported()[name][0]) for name, _ in TOLD] == TOLD and len(TOLD) == 3


def test_importing_brings_nothing_heavy():
    """What costs time to import beside torch is left until it is needed."""
    assert imported()["minialign"][1:] == []


# ----------------------------------------------------------------------------------------------------------- commands
RUN_BY = {  # how a command begins (the longest such counts): the test or script that runs it, "" where there is none
    "python -m venv": ".ci/run::python3 -m venv",
    ". .venv/bin/activate": ".ci/run::bin/activate",
    "pip install torch": ".ci/run::pip install --quiet torch",
    "pip install -e": ".ci/run::pip install --quiet -e",
    "pytest": ".ci/run::pytest -q",
    "pytest bench/": "",
    "python -m minialign.finetune": "test_main_job.py::test_the_default_run_raises_alignment_by_20_points",
    "python -m minialign.finetune --model": "test_finetune.py::test_own_images_go_through_the_same_code",
    "python -m minialign.generate": "test_generate.py::test_images_and_store_belong_together",
    "python -m minialign.label": (
        "test_label.py::test_a_full_disk_and_a_killed_server_lose_nothing_that_was_acknowledged"
    ),
    "python -m minialign.label RUN --export": "test_label.py::test_labels_go_out_and_in_by_command",
    "python -m minialign.label RUN --annotator": "test_finetune.py::test_the_chain_of_commands_is_the_main_job",
    "python -m minialign.finetune RUN": "test_finetune.py::test_the_chain_of_commands_is_the_main_job",
    "python docs/minimal.py": "test_minimal.py::test_the_page_gains_15_points",
    "python -m minialign.reward": "test_reward.py::test_the_command_learns_from_the_store",
    "python -m minialign.evaluate": "test_evaluate.py::test_the_command_compares_pipelines",
    "python -m minialign.shapes.pretrain": "test_docs.py::left",
    "python -m minialign.study": "test_study.py::test_the_command_quick",
    "python -m minialign.pages.normal": "test_report.py::test_the_band_holds_what_the_seeds_logged",
    "pytest bench/ --device meta": "test_benchmarks.py::test_the_benchmarks_run_on_any_device",
    "python bench/report.py": "test_benchmarks.py::test_report_makes_the_page",
    "python bench/counts.py": "test_counts.py::test_counts_are_those_of_the_page",
    "torchrun": "test_distributed.py::test_the_command_runs_under_torchrun",
    "sha256sum -c": "test_docs.py::test_checksums_are_as_the_system_reads_them",
    "sqlite3": "test_docs.py::test_the_tables_of_the_store_are_those_of_the_page",
}
MARK = re.compile(r"\bGPUs?\b|(?<!no )\bnetwork\b|\bminutes\b|\bhours?\b")  # what a command asks for
STAGES = ("finetune", "generate", "label", "reward", "evaluate", "study", "shapes.pretrain")
LAUNCHER = get_args_parser()
PROGRAMS = ("python", "pytest", "torchrun", "pip", "sqlite3", "ssh", "sha256sum", ".")


class Command(NamedTuple):
    page: str
    text: str
    marked: bool


def commands(page: Path) -> list[Command]:
    """The commands of a page: of its indented and shell blocks every line, in its text what begins like one.

    A command is marked by a comment on its line or on the line above, or, where it is alone, by the first sentence that
    follows; in a table in its row, in a text in its sentence.
    """
    found, text = [], page.read_text()

    def add(line: str, about: str) -> None:
        for part in re.split(r"&&|;", line):
            part = re.sub(r"^(do |\w+=\S+ )+|( \.\.\.)+$", "", part.strip())
            if part and not re.match(r"for \w+ in |done$", part):
                found.append(Command(page.name, part, bool(MARK.search(about))))

    shell = [(body, "") for kind, body in FENCE.findall(text) if kind in ("", "sh", "bash", "shell", "console")]
    text = FENCE.sub("", text)
    indented = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)(?=\n?((?:.+\n)*))")
    for block, after in [*shell, *indented.findall(text)]:
        lines = block.replace("\\\n", " ").splitlines()
        above = re.split(r"(?<=\.)\s", after)[0] if len(lines) == 1 else ""
        for line in lines:
            line, _, comment = f" {line}".partition(" #")
            if line.strip():
                add(" ".join(line.split()), comment + above)
            above = comment if not line.strip() else ""
    for paragraph in indented.sub("", text).split("\n\n"):
        rows = paragraph.startswith("|")
        for place in paragraph.split("\n") if rows else re.split(r"(?<=[.:]) ", paragraph.replace("\n", " ")):
            for code in re.findall(r"`([^`]+)`", place):
                if code.startswith(tuple(f"{program} " for program in PROGRAMS)):
                    add(code, place)
    return found


class Parsed(Exception):
    """A command's own parser took its arguments; the message is its help."""


def started(words: list[str], start: Callable[[], Any], accept: bool = True) -> str:
    """Start a command up to its own parser; what its --help says. `accept`: the parser has to take the arguments."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser, *how):
        if accept:
            read(parser, *how)
        raise Parsed(parser.format_help())

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy's, of modules that are imported already
        patch.setattr(sys, "argv", words)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            start()
        except Parsed as told:
            return str(told)
        except SystemExit as refused:
            raise AssertionError(f"{' '.join(words)}: refused by its parser ({refused})") from refused
    raise AssertionError(f"{' '.join(words)}: reads its arguments without a parser")


def module_help(name: str, *arguments: str, accept: bool = True) -> str:
    return started([name, *arguments], lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), accept)


@cache
def help_of(*program: str) -> str:
    if program[0].startswith("minialign."):
        return module_help(program[0], accept=False)
    done = subprocess.run([sys.executable, "-m", *program, "--help"], capture_output=True, text=True, check=True)
    return done.stdout


def flags(words: Iterable[str]) -> set[str]:
    return {flag for word in words for flag in re.findall(r"^--[a-z][\w-]*", word)}


def check(words: list[str]) -> None:
    """Have a command's own parser read it; all its flags must be in the program's --help, and spelled out."""
    if words[0] == "torchrun":
        arguments = LAUNCHER.parse_args(words[1:])
        assert arguments.module
        words, script = words[: words.index("-m")], ["python", "-m", arguments.training_script]
        check([*script, *arguments.training_script_args])
        told = LAUNCHER.format_help()
    elif words[:2] == ["python", "-m"]:
        told = module_help(*words[2:]) if words[2].startswith("minialign.") else help_of(words[2])
    elif words[0] == "python":
        path = ROOT / words[1]
        has_parser = "argparse" in path.read_text()
        told = started(words[1:], lambda: runpy.run_path(str(path), run_name="__main__")) if has_parser else ""
    elif words[0] == "pytest":
        told = help_of("pytest", *(word for word in words if word.endswith("/")))  # and the options of that folder
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"^\.\[([\w,]+)\]$", words[-1])
        known = (ROOT / "pyproject.toml").read_text()
        names = [rf"^{extra} = \[" for extra in extras[1].split(",")] if extras else [rf'"{words[2]}\b']
        assert all(re.search(name, known, re.M) for name in names), words
        told = help_of("pip", "install")
    else:
        assert words[0] in PROGRAMS, f"{words[0]}: not a program that the pages are known to use"
        return
    assert [flag for flag in flags(words) if not re.search(rf"{flag}\b(?!-)", told)] == [], words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_run_by_a_test_or_marked(page):
    found = commands(page)
    assert found or page in (METHOD, READING)
    for command in found:
        check([re.sub(r"^(N|\$\w+)$", "1", word) for word in shlex.split(command.text)])
        begin = max((begin for begin in RUN_BY if command.text.startswith(begin)), key=len, default=None)
        place, _, name = RUN_BY.get(begin, "").partition("::")
        if place:
            path = ROOT / place if place.startswith(".") else ROOT / "reference_tests" / place
            source = path.read_text() if path.exists() else ""
            assert (f"def {name}(" if place.endswith(".py") else name) in source, f"{command} is run by {RUN_BY[begin]}"
        else:
            assert command.marked, f"{command}: run by no test, and nothing says what it needs (GPU, network, minutes)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_are_known(page):
    """Those that stand alone, as in `--steps 7`, by any of the commands; `finetune --steps` by that one."""
    anywhere = LAUNCHER.format_help() + "".join(help_of(f"minialign.{stage}") for stage in STAGES)
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
        stage = next((stage for stage in STAGES if code.startswith(f"{stage} --")), None)
        if stage or code.startswith("--"):
            told = help_of(f"minialign.{stage}") if stage else anywhere
            assert [flag for flag in flags(code.split()) if not re.search(rf"{flag}\b(?!-)", told)] == [], code


# -------------------------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with what each command leaves of a tiny job, with nearly everything switched on."""
    # Eight whole commands, two of them fine-tuning jobs: its tests are slow.
    folder = tmp_path_factory.mktemp("left")
    run, own, generated, labels = (folder / name for name in ("run", "own", "generated", "labels.csv"))
    pairs = pretraining_pairs(folder / "pairs")
    (folder / "prompts.txt").write_text("a red circle\ntwo blue stars\n")
    small = words_of(SMALL, "hidden", "reward_steps", "steps", "batch_size", "test_images", "sampling_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")

        def command(main, *arguments):
            patch.setattr(sys, "argv", ["minialign", *map(str, arguments)])
            main()

        patch.setattr(pretrain, "annotator_statistics", partial(pretrain.annotator_statistics, number=40))
        for name in ("train_vae", "polish_decoder", "train_clip", "train_unet"):
            patch.setattr(pretrain, name, partial(getattr(pretrain, name), batch=4))
        command(finetune, run, *words_of(SMALL))
        command(evaluate, run, "--test-images", 8, "--test-images-per-prompt", 2)
        command(label, run, "--export", labels)
        command(generate, generated, "--prompts", folder / "prompts.txt", "--sampling-steps", 1)
        command(label, generated, "--import", labels)
        command(reward, generated, "--reward-steps", 20, "--hidden", 8)
        given = ["--model", EMBEDDED, "--clip", EMBEDDED / "clip", "--feedback", labels, "--pretrain", pairs]
        command(finetune, own, *given, *small, "--lora", 1, "--validate-every", 2)
        steps = [f"--{stage}-steps" for stage in ("vae", "decoder", "clip", "unet", "noisy")]
        arguments = ["--out", folder / "pretrain", "--images", 8, *(word for flag in steps for word in (flag, 1))]
        command(pretrain.main, *arguments)
    return folder


def named() -> list[str]:
    """The files that the tables of docs/formats.md say are there, as patterns; those of folders end in a slash."""
    tables = re.findall(r"^\| file \| content \|\n\|.*\n((?:\|.*\n)+)", FORMATS.read_text(), re.M)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.sub(r"(?<![A-Za-z])N(?![A-Za-z])", r"\\d+", re.escape(name)).replace(r"\*", "[^/]+") for name in names]


def is_named(path: str, names: list[str]) -> bool:
    """Whether one of the names is the path's, or that of a folder that it is in and the rest is named."""
    if any(re.fullmatch(name, path) for name in names):
        return True
    folders = (re.match(name, path) for name in names if name.endswith("/"))
    return any(is_named(path[folder.end() :], names) for folder in folders if folder)


@pytest.mark.slow
def test_every_file_that_is_left_is_named(left):
    names = named()
    for run in ("run", "own", "generated", "pretrain"):
        files = [path.relative_to(left / run).as_posix() for path in (left / run).rglob("*") if path.is_file()]
        assert files and [file for file in files if not is_named(file, names)] == [], run


@pytest.mark.slow
def test_every_file_that_is_named_is_left(left):
    pytest.importorskip("tensorboard"), pytest.importorskip("matplotlib")
    files = [path.relative_to(left).as_posix() + "/" * path.is_dir() for path in left.rglob("*")]
    assert [name for name in named() if not any(re.fullmatch(rf".*/{name}", f"/{file}") for file in files)] == []


@pytest.mark.slow
def test_the_tables_of_the_store_are_those_of_the_page(left):
    table, told = "", set()
    for row in re.findall(r"^\| (`\w+`)? ?\| (`\w+`(?:, `\w+`)*) \|", sections(FORMATS)["feedbacksqlite"], re.M):
        table = row[0].strip("`") or table
        told |= {(table, column) for column in re.findall(r"\w+", row[1])}
    store = sqlite3.connect(left / "run" / "feedback.sqlite")
    there = store.execute("SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c").fetchall()
    version = store.execute("PRAGMA user_version").fetchone()[0]
    store.close()
    assert told == set(there) and f"schema's version, {version}" in FORMATS.read_text()


@pytest.mark.slow
def test_what_is_in_json_files_is_named(left):
    """The keys of the objects that commands leave, in the row of their file or on the page's way there."""
    page = FORMATS.read_text()
    for path in ("config", "stages", "results", "reward/held_out"):
        for run in ("run", "own", "generated"):
            file = left / run / f"{path}.json"
            keys = json.loads(file.read_text()).keys() if file.exists() else ()
            assert [key for key in keys if f"`{key}`" not in page] == [], file
    found = json.loads((left / "run" / "results.json").read_text())
    assert {"evaluation", "comparisons", "reward"} <= found.keys()
    measured = next(iter(found["reward"]["measured"]["auxiliary"].values()))
    for part in (found["evaluation"], *found["comparisons"].values(), measured, *found["evaluation"]["samples"]):
        assert [key for key in part if f"`{key}`" not in page] == []


def test_the_table_of_settings_is_the_programs():
    def cell(value: object) -> str:
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    rows = re.findall(r"^\| (`--.*) \|$", sections(FORMATS)["settings"], re.M)
    expected = [
        (f"`{one.flag}`", *map(cell, (one.bundled, one.own, RECIPES["paper"].get(one.name))), ", ".join(one.stages),
         one.about, "yes" * one.free)
        for one in SETTINGS
    ]  # fmt: skip
    assert [tuple(row.split(" | ")) for row in rows] == expected


@pytest.mark.slow
def test_checksums_are_as_the_system_reads_them(left):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    place = next((left / "run" / "checkpoints").glob("step-*"))
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK\n") == 1, done.stderr
