"""The one table of settings: what it holds, what --help says of it, what a command line gives, the command it makes."""

import argparse

import pytest
from helpers import command as run_command

from minialign.engine.commands import Parser
from minialign.engine.settings import (
    BY_NAME,
    RECIPES,
    SETTINGS,
    STAGES,
    add_run_flags,
    as_shell,
    command,
    defaults,
    given,
    of_stage,
    switch,
)
from minialign.finetune.__main__ import parse_arguments


def parser(*stages: str, without: tuple[str, ...] = ()) -> Parser:
    made = Parser(prog="command")
    add_run_flags(made, *(stages or STAGES), without=without)
    return made


def test_every_row_says_what_it_is():
    assert len(BY_NAME) == len(SETTINGS)
    for setting in SETTINGS:
        assert setting.stages and set(setting.stages) <= set(STAGES), setting.name
        assert list(setting.stages) == [stage for stage in STAGES if stage in setting.stages], setting.name
        assert setting.about, setting.name
        for default in (setting.bundled, setting.own):  # a default is a value that the flag takes
            if setting.kind is switch:
                assert isinstance(default, bool)
            elif isinstance(setting.kind, tuple):
                assert default in setting.kind
            elif default is not None:
                assert setting.kind(str(default)) == default, setting.name
    assert {stage for setting in SETTINGS for stage in setting.stages} == set(STAGES)
    for recipe in RECIPES.values():
        assert recipe.keys() <= BY_NAME.keys()
    assert {setting.name for setting in SETTINGS if setting.source} == {
        "model", "vae", "prompts", "reward", "clip", "contrastive", "pretrain",
    }  # fmt: skip


def test_defaults_and_stages_are_of_the_table():
    for bundled in (True, False):
        found = defaults(bundled)
        assert found.keys() == BY_NAME.keys()
        assert all(value == BY_NAME[name].default(bundled) for name, value in found.items())
    assert defaults(True, "label") == {"seed": 0, "labels": 1280}
    assert [setting.name for setting in of_stage("label")] == ["seed", "labels"]
    names = [setting.name for setting in of_stage("generate", "reward")]
    assert names == [name for name in BY_NAME if {"generate", "reward"} & set(BY_NAME[name].stages)]


@pytest.mark.parametrize("stage", STAGES)
def test_help_has_every_flag_of_a_stage_with_its_default(stage):
    text = "".join(parser(stage).format_help().split())  # lines are broken at hyphens too
    for setting in SETTINGS:
        there = "".join(setting.help.replace("%%", "%").split()) in text
        assert there == (stage in setting.stages), setting.name
        if there:
            assert setting.flag in text
            for default in {setting.bundled, setting.own} - {None}:
                said = str(default).lower() if isinstance(default, bool) else str(default)
                assert said in setting.help.split("(default: ")[1], setting.name
    assert "--redo" in text and "--device" in text


def test_help_lines_of_both_worlds():
    assert BY_NAME["steps"].help == "fine-tuning steps (default: 300; with --model: 2000)"
    assert BY_NAME["images"].help.endswith("(default: 2560; with --model: none)")
    assert BY_NAME["seed"].help == "random seed of every stage (default: 0)"
    assert BY_NAME["compile"].help.endswith("(default: false)") and "(default" not in BY_NAME["pretrain"].help
    for groups in (parser()._action_groups[2:], parser("reward")._action_groups[2:]):
        titles = [group.title for group in groups]
        assert titles == list(dict.fromkeys(titles)) and titles[-1] == "hardware"  # each once
        assert "--device" in groups[-1]._group_actions[-1].option_strings


def test_what_is_not_given_is_not_there():
    args = parser().parse_args(["--steps", "7", "--no-compile", "--batch_size", "9"])
    assert given(args) == {"steps": 7, "compile": False, "batch_size": 9}
    assert given(argparse.Namespace(run="x", redo=True, device="cpu", model=None)) == {}
    with pytest.raises(SystemExit):
        parser("generate", without=("model",)).parse_args(["--model", "x"])


def test_a_second_reward_is_refused_and_not_taken_in_place_of_the_first(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--reward", "learned", "--reward=clip-score"])
    assert "--reward: given twice; accepted: once, with commas between the terms" in capsys.readouterr().err
    assert parser().parse_args(["--reward", "learned,clip-score"]).reward == "learned,clip-score"


def test_files_are_given_by_absolute_paths_and_hub_ids_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.txt", "vae.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "pairs").mkdir()
    (tmp_path / "shard-1.tar").touch()
    words = "--prompts prompts.txt --vae vae.safetensors --pretrain pairs --model someone/model --clip none"
    assert given(parser().parse_args(words.split())) == {
        "prompts": str(tmp_path / "prompts.txt"),
        "vae": str(tmp_path / "vae.safetensors"),
        "pretrain": str(tmp_path / "pairs"),
        "model": "someone/model",
        "clip": "none",
    }
    shards = given(parser().parse_args(["--pretrain", "shard-*.tar"]))
    assert shards == {"pretrain": str(tmp_path / "shard-*.tar")}
    (tmp_path / "categories").touch()  # a word, whatever stands in the folder
    assert given(parser().parse_args(["--prompts", "categories"])) == {"prompts": "categories"}


@pytest.mark.parametrize("bundled", [True, False])
def test_the_command_leaves_defaults_out(bundled):
    start = ["python", "-m", "minialign.finetune"]
    assert command({}, bundled) == command(defaults(bundled), bundled) == start
    settings = defaults(bundled) | {"steps": 7, "compile": True, "prompts": "my prompts.txt", "noise_offset": 1e-6}
    words = command(settings, bundled, "runs/my run")
    assert words == [*start, "runs/my run", "--prompts", "my prompts.txt", "--steps", "7", "--noise-offset", "1e-06",
                     "--compile"]  # fmt: skip
    assert as_shell(words).count("'my prompts.txt'") == 1
    assert given(parse_arguments(words[3:])).items() >= {("steps", 7), ("compile", True), ("noise_offset", 1e-6)}


def test_a_setting_out_of_its_range_is_one_line(capsys):
    def main():
        parser().parse_args()

    for words, told in (
        (("--pretrain-fraction", "1.5"), "--pretrain-fraction: '1.5'; accepted: a number from 0 to 1"),
        (("--seed", "-1"), "--seed: '-1'; accepted: a whole number from 0 to 20000"),
        (("--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
    ):
        code, _, err = run_command(main, capsys, *words)
        assert code == 2 and told in err and err.count("\n") == 1
