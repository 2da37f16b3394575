"""What goes out to other trainers: a table and JSON lines of weights, folders by repeats, and nothing overwritten."""

import csv
import json

import pytest
import torch
from PIL import Image

from minialign.feedback import FeedbackStore
from minialign.files import InputError, write_tensors
from minialign.reward import REWARDS
from minialign.reward.export import export_rewards

PROMPTS = ["=a fox", "a fox, red", 'a "fox"', "a cat"]
REWARD = [0.98, 0.5, 0.04, 0.52]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / "images" / f"{i}.png")
    store = FeedbackStore(folder)
    store.add_images([(prompt, f"images/{i}.png", i) for i, prompt in enumerate(PROMPTS)])
    store.close()
    write_tensors(folder / REWARDS, {"reward": torch.tensor(REWARD)})
    return folder


def test_a_table_and_json_lines_hold_the_weights(run, tmp_path):
    mean = sum(REWARD) / 4
    assert export_rewards(run, tmp_path / "out" / "weights.csv", run / REWARDS) == "4 images"
    export_rewards(run, tmp_path / "out" / "weights.jsonl", run / REWARDS)
    with open(tmp_path / "out" / "weights.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "out" / "weights.jsonl").read_text().splitlines()]
    export_rewards(run, tmp_path / "out" / "metadata.jsonl", run / REWARDS)  # as the hub's imagefolder has it
    hub = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [list(row) for row in hub] == [["file_name", "text", "reward", "weight"]] * 4
    assert [list(row.values()) for row in hub] == [list(row.values()) for row in lines]
    assert [row["prompt"] for row in lines] == PROMPTS
    assert [row["prompt"] for row in table] == ["'=a fox", *PROMPTS[1:]]  # which no spreadsheet runs
    for rows in (table, lines):
        assert list(rows[0]) == ["image", "prompt", "reward", "weight"]
        assert [float(row["reward"]) for row in rows] == pytest.approx(REWARD, abs=1e-6)
        assert [float(row["weight"]) for row in rows] == pytest.approx([r / mean for r in REWARD], abs=1e-5)
        assert [(tmp_path / "out" / row["image"]).resolve() for row in rows] == [
            run / "images" / f"{i}.png" for i in range(4)
        ]


def test_folders_repeat_images_in_proportion_to_their_reward(run, tmp_path):
    export_rewards(run, tmp_path / "kohya-1.5", run / REWARDS)  # a name may have a dot
    said = export_rewards(run, tmp_path / "kohya", run / REWARDS)
    assert said == "3 of 4 images, 20 with their repeats"
    left = {path.relative_to(tmp_path / "kohya").as_posix() for path in (tmp_path / "kohya").rglob("*.*")}
    assert left == {f"{name}.{end}" for name in ("10_reward/000000", "5_reward/000001", "5_reward/000003")
                    for end in ("png", "txt")}  # fmt: skip
    assert (tmp_path / "kohya" / "5_reward" / "000001.txt").read_text() == "a fox, red\n"
    assert (tmp_path / "kohya" / "10_reward" / "000000.png").read_bytes() == (run / "images" / "0.png").read_bytes()


def test_an_export_replaces_nothing_and_tells_what_is_missing(run, tmp_path):
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path / "mine" / "weights.csv"):
        (tmp_path / "mine" / "weights.csv").write_text("mine")
        with pytest.raises(InputError, match="is there; accepted: a new name, or an empty folder"):
            export_rewards(run, place, run / REWARDS)
    assert (tmp_path / "mine" / "weights.csv").read_text() == "mine"
    write_tensors(run / REWARDS, {"reward": torch.full((4,), 0.01)})
    with pytest.raises(InputError, match="all rewards round to 0 repeats"):
        export_rewards(run, tmp_path / "none", run / REWARDS)
    write_tensors(run / REWARDS, {"reward": torch.zeros(4)})
    with pytest.raises(InputError, match="no image has a reward above 0"):
        export_rewards(run, tmp_path / "none.csv", run / REWARDS)
    write_tensors(run / REWARDS, {"reward": torch.ones(3)})
    with pytest.raises(InputError, match="of 3 images, where the run has 4"):
        export_rewards(run, tmp_path / "none.csv", run / REWARDS)
    (run / REWARDS).unlink()
    with pytest.raises(InputError, match="no rewards yet; python -m minialign.reward"):
        export_rewards(run, tmp_path / "none.csv", run / REWARDS)
    for name in ("weights.json", "weights.txt", "weights.parquet"):
        with pytest.raises(InputError, match="accepted: a name that ends in .csv, .tsv, .jsonl, or that of a folder"):
            export_rewards(run, tmp_path / name, run / REWARDS)
        assert not (tmp_path / name).exists()
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.csv").exists()
