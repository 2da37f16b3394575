"""The pipeline: from and to the diffusers layout, the same images as diffusers, and clear errors for bad folders."""

import fnmatch
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minialign import CLIP, Pipeline
from minialign.models.pretrained import EMBEDDED, InputError, resolve
from minialign.pipeline import to_images, to_pixels


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained()


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def test_images_do_not_depend_on_the_batch(pipe):
    prompts = ["a red circle", "two stars", "a square at night"]
    together = pipe.generate(prompts, steps=3, guidance=2.0, seed=5)
    alone = [pipe.generate(prompt, steps=3, guidance=2.0, seed=5 + i)[0] for i, prompt in enumerate(prompts)]
    for a, b in zip(together, alone):
        assert a.size == (64, 64) and a.mode == "RGB"
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    given = pipe.generate(prompts, steps=3, guidance=2.0, latents=pipe.noise([5, 6, 7]))
    assert [a.tobytes() for a in given] == [a.tobytes() for a in together]
    other = pipe.generate(prompts, steps=3, guidance=2.0, seed=5, negative_prompt="a blue star")
    assert [a.tobytes() for a in other] != [a.tobytes() for a in together]
    with pytest.raises(ValueError, match="latents has 3 rows for 1 prompts"):
        pipe.generate("a star", latents=pipe.noise([1, 2, 3]))


def test_pixels_and_images_are_inverse():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    pixels = to_pixels([image])
    assert pixels.shape == (1, 3, 4, 4) and pixels.min() == -1 and pixels.max() <= 1
    assert to_images(pixels)[0].tobytes() == image.tobytes()
    assert to_images(torch.full((1, 3, 2, 2), 7.0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_saved_pipeline_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        mine, theirs = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine | theirs)
    assert pipe.generate("a star", steps=2)[0].tobytes() == again.generate("a star", steps=2)[0].tobytes()


def test_diffusers_draws_the_same_images(pipe, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipe.save_pretrained(tmp_path)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    prompts, latents = ["two red circles on the sand", "a star at night"], pipe.noise([3, 4])
    mine = pipe.generate(prompts, steps=10, guidance=2.0, latents=latents)
    theirs = peer(prompts, num_inference_steps=10, guidance_scale=2.0, latents=latents, height=64, width=64).images
    for a, b in zip(mine, theirs):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_transformers_reads_the_embedded_clip():
    transformers = pytest.importorskip("transformers")
    mine, theirs = CLIP.from_pretrained(), transformers.CLIPModel.from_pretrained(EMBEDDED / "clip").float().eval()
    ids, pixels = mine.tokenizer(["a red star", "four squares"]), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = theirs(input_ids=ids, pixel_values=pixels)
        for embeds, expected in (
            (mine.encode_image(pixels), output.image_embeds),
            (mine.encode_text(ids), output.text_embeds),
        ):
            torch.testing.assert_close(torch.nn.functional.normalize(embeds, dim=1), expected, rtol=1e-4, atol=1e-5)


def spoil_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


UNET = "unet/diffusion_pytorch_model.safetensors"


def inpainting(folder: Path) -> None:
    spoil_json(folder / "unet/config.json", in_channels=17)
    widen = torch.nn.functional.pad
    spoil_weights(folder / UNET, lambda w: w.update({"conv_in.weight": widen(w["conv_in.weight"], (0, 0, 0, 0, 0, 9))}))


SPOILED = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json: cannot be read"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), "a JSON object is needed"),
    "another network": (
        lambda f: spoil_json(f / "model_index.json", unet=["diffusers", "UNet3D"]),
        "unet is 'UNet3D'; supported: 'UNet2DConditionModel'",
    ),
    "a config value": (
        lambda f: spoil_json(f / "unet/config.json", act_fn="mish"),
        "unet/config.json: UNet2DConditionModel config: act_fn='mish' is not built; supported: 'silu'",
    ),
    "a schedule": (
        lambda f: spoil_json(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "scheduler_config.json: scheduler config: beta_schedule='sigmoid' is not built",
    ),
    "a schedule of words": (
        lambda f: spoil_json(f / "scheduler/scheduler_config.json", num_train_timesteps="1000"),
        "scheduler_config.json: ",
    ),
    "no levels": (lambda f: spoil_json(f / "unet/config.json", block_out_channels=[]), "unet/config.json: "),
    "no groups": (lambda f: spoil_json(f / "unet/config.json", norm_num_groups=0), "unet/config.json: "),
    "widths of text": (
        lambda f: spoil_json(f / "unet/config.json", cross_attention_dim=[64, 64]),
        "cross_attention_dim=[64, 64] is not built",
    ),
    "layers of layers": (
        lambda f: spoil_json(f / "unet/config.json", transformer_layers_per_block=[[1], [1]]),
        "transformer_layers_per_block=[[1], [1]] is not built",
    ),
    "a UNet for inpainting": (inpainting, "unet: in_channels is 17; accepted with the other parts: 8"),
    "a longer tokenizer": (
        lambda f: spoil_json(f / "tokenizer/tokenizer_config.json", model_max_length=99),
        "tokenizer: model_max_length is 99; accepted with the other parts: 2 to ",
    ),
    "truncated": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:1000]), f"{UNET}: not a readable"),
    "a missing key": (lambda f: spoil_weights(f / UNET, lambda w: w.pop("conv_in.bias")), "lacks conv_in.bias"),
    "an unexpected key": (
        lambda f: spoil_weights(f / UNET, lambda w: w.update(extra=torch.zeros(1))),
        "has unexpected extra",
    ),
    "a wrong shape": (
        lambda f: spoil_weights(f / UNET, lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
        "conv_in.bias has shape (3,), expected (64,)",
    ),
    "pickled": (lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"), "pickled weights can run code"),
    "no weights": (lambda f: (f / UNET).unlink(), "unet: no weights; accepted: diffusion_pytorch_model.safetensors"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_bad_checkpoints_are_refused_by_name(folder, name):
    spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(InputError) as error:
        Pipeline.from_pretrained(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="File name too long"):
        resolve("long" * 100, [])
    for source in ("no/such/folder", str(tmp_path / "nothing"), "a b"):
        with pytest.raises(InputError, match="not found; accepted: a folder in the diffusers layout or a hub id"):
            resolve(source, [])


HUB = [
    "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "preview.png",
    "feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/openvino_model.bin",
    "tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_flax_model.msgpack", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_hub_repository_only_what_is_needed_is_asked_for(monkeypatch, variant):
    import huggingface_hub

    asked: dict = {}

    def snapshot_download(repo_id, *, allow_patterns, **hub):
        files = [file for file in HUB if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)]
        assert files == list(huggingface_hub.utils.filter_repo_objects(HUB, allow_patterns=allow_patterns))
        asked.update(repo_id=repo_id, files=files, **hub)
        return str(EMBEDDED)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    how = {"revision": "v1", "token": "hf_x", "cache_dir": "/c", "local_files_only": True}
    try:
        Pipeline.from_pretrained("someone/something", variant=variant, **how)
    except InputError:
        assert variant  # the folder has no such files
    networks = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    needed = {"README.md", "model_index.json", "scheduler/scheduler_config.json"}
    needed |= {file for file in HUB if file.startswith("tokenizer/")} | {f"{part}/config.json" for part in networks}
    end = f".{variant}.safetensors" if variant else ".safetensors"
    assert set(asked.pop("files")) == needed | {f"{part}/{name}{end}" for part, name in networks.items()}
    assert asked == {"repo_id": "someone/something"} | how
    with pytest.raises(TypeError, match="revison"):
        Pipeline.from_pretrained(EMBEDDED, revison="v1")


def test_a_cached_hub_id_needs_no_network(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--something"
    shutil.copytree(EMBEDDED, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (cached / "blobs").mkdir()
    pipe = Pipeline.from_pretrained("someone/something", cache_dir=tmp_path, local_files_only=True)
    assert pipe.generate("a star", steps=1)[0].size == (64, 64)
    with pytest.raises(InputError, match="someone/another: neither a folder nor a hub id that can be fetched"):
        Pipeline.from_pretrained("someone/another", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(InputError, match="model.safetensors: a file; accepted: a folder that transformers writes"):
        CLIP.from_pretrained(EMBEDDED / "clip" / "model.safetensors")


def test_an_unknown_hub_id_is_one_line(monkeypatch):
    import huggingface_hub

    def snapshot_download(*args, **kwargs):
        raise RuntimeError("a proxy's answer\nmore lines")  # of a kind that the hub does not make its own

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError) as error:
        Pipeline.from_pretrained("someone/nothing")
    assert "someone/nothing" in str(error.value) and "\n" not in str(error.value)
