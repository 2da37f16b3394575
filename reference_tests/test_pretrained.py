"""Networks out of and into folders, without peers: variants, parts of a pipeline, unused weights, equal bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign import Pipeline
from minialign.files import InputError
from minialign.models.pretrained import EMBEDDED, save_network, weights_files

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline with links in place of the files that a test does not change."""
    place = tmp_path / "model"
    shutil.copytree(EMBEDDED, place, copy_function=lambda source, to: Path(to).symlink_to(source))
    return place


def renamed(path: Path, variant: str) -> None:
    path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def test_a_variant_of_the_unet_alone(folder):
    weights = {key: 2 * tensor for key, tensor in load_file(folder / UNET).items()}
    save_file(weights, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    pipe, plain = Pipeline.from_pretrained(folder, variant="non_ema"), Pipeline.from_pretrained(folder)
    assert torch.equal(pipe.unet.conv_in.weight, 2 * plain.unet.conv_in.weight)
    with pytest.raises(InputError, match="model: no network has weights of the variant 'ema'"):
        Pipeline.from_pretrained(folder, variant="ema")


def test_the_one_variant_that_is_there_is_taken_and_several_are_named(folder):
    for path in (folder / UNET, folder / TEXT):
        renamed(path, "fp16")
    assert len(Pipeline.from_pretrained(folder).encode_prompts(["a star"])[0]) == 1
    (folder / "unet/diffusion_pytorch_model.safetensors.index.non_ema.json").write_text("{}")
    with pytest.raises(InputError, match="unet: has weights of variants alone; accepted: variant=fp16 or non_ema"):
        Pipeline.from_pretrained(folder)
    (folder / "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()  # a shard is no variant
    assert weights_files(folder / "unet", "diffusion_pytorch_model", "fp16")[0].name.endswith(".fp16.safetensors")


def test_of_a_hub_repository_plain_weights_are_fetched_where_the_variant_has_none(folder, monkeypatch):
    import huggingface_hub

    renamed(folder / UNET, "fp16")
    asked: list[list[str]] = []

    def snapshot_download(repo_id, *, allow_patterns, **hub):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Pipeline.from_pretrained("someone/something", variant="fp16")
    first, second = ([file for file in patterns if file.endswith("model.safetensors")] for patterns in asked)
    assert first == [] and second == [
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]


def test_of_a_hub_repository_the_one_variant_is_fetched_where_there_are_no_plain_weights(folder, monkeypatch):
    import huggingface_hub

    hidden = (folder / UNET).rename(folder / "not yet fetched")
    asked: list[list[str]] = []

    def snapshot_download(repo_id, *, allow_patterns, **hub):
        asked.append(allow_patterns)
        if len(asked) == 2:
            hidden.rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Pipeline.from_pretrained("someone/something")
    assert asked[1:] == [["unet/diffusion_pytorch_model*.safetensors*"]]


def test_a_text_tower_with_the_rest_of_clip(folder):
    """The bundled CLIP's own file: its text tower is the pipeline's, whatever else there is."""
    weights = load_file(folder / TEXT)
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    rest = {"vision_model.post_layernorm.bias": torch.zeros(3), "logit_scale": torch.ones(())}
    rest |= {"text_projection.weight": torch.eye(width), "visual_projection.weight": torch.zeros(3, 3)}
    before = Pipeline.from_pretrained(folder).encode_prompts(["a star"])[0]
    (folder / TEXT).unlink()
    save_file(weights | rest, folder / TEXT)
    assert torch.equal(Pipeline.from_pretrained(folder).encode_prompts(["a star"])[0], before)
    save_file(weights | {"other": torch.zeros(1)}, folder / TEXT)
    with pytest.raises(InputError, match="has unexpected text_model.other"):
        Pipeline.from_pretrained(folder)


def test_a_network_is_not_a_pipeline(folder):
    with pytest.raises(InputError, match=r"unet: is the unet of a pipeline alone; give the folder above, .*/model$"):
        Pipeline.from_pretrained(folder / "unet")
    (folder / "model_index.json").unlink()
    with pytest.raises(InputError, match="unet: is a unet alone; put it as unet/ into a copy of its pipeline"):
        Pipeline.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(InputError, match="model: has no model_index.json but unet alone; copy it into its pipeline"):
        Pipeline.from_pretrained(folder)
    config = json.loads((folder / "unet/config.json").read_text())
    other = folder / "checkpoint-500"
    (folder / "unet").rename(other)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(InputError, match="checkpoint-500: is a unet alone"):
        Pipeline.from_pretrained(other)


def test_what_is_saved_twice_has_the_same_bytes(folder, tmp_path):
    network = Pipeline.from_pretrained(folder).text_encoder
    for i in range(6):  # an order by chance would be the same once in two
        save_network(network, tmp_path / str(i))
    files = [(tmp_path / str(i) / "diffusion_pytorch_model.safetensors").read_bytes() for i in range(6)]
    assert len(set(files)) == 1
