"""The pipeline: from and to the diffusers layout, the same images as diffusers, and clear errors for bad folders."""

import fnmatch
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minialign import CLIP, Pipeline
from minialign.files import InputError
from minialign.models import original
from minialign.models.pretrained import EMBEDDED, resolve
from minialign.pipeline import cut_prompts, to_images, to_pixels
from minialign.shapes.pretrain import CHANNELS


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


def test_guidance_of_0_is_the_prompt_alone(pipe):
    off, one = (pipe.generate(["a red circle", "a star"], steps=2, guidance=guidance) for guidance in (0.0, 1.0))
    assert [a.tobytes() for a in off] == [a.tobytes() for a in one] and off[0].tobytes() != off[1].tobytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("unet", "the latents of 1 of 1 images have numbers that are not finite: "),
        ("vae", "what the autoencoder makes of the latents of 1 of 1 images have numbers that are not finite: "),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_that_are_not_finite_become_no_images(dtype, broken, message):
    pipe = Pipeline.from_pretrained(dtype=dtype)
    bias = (pipe.unet if broken == "unet" else pipe.vae.decoder).conv_out.bias
    with torch.no_grad():
        bias.fill_(float("inf") if dtype == torch.float16 else float("nan"))
    with pytest.raises(InputError) as error:
        pipe.generate("a star", steps=1)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert ("dtype float32 or bfloat16" in str(error.value)) is (dtype == torch.float16)


def test_what_generate_refuses(pipe, folder):
    with pytest.raises(InputError, match="^steps=1001 is out of range; accepted with this schedule: 1 to 1000$"):
        pipe.generate("a star", steps=1001)
    spoil_json(folder / "scheduler/scheduler_config.json", prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match="steps=2 begins at timestep 999.* prediction_type=v_prediction$"):
        Pipeline.from_pretrained(folder).generate("a star", steps=2)
    for negative, kind in ((None, "NoneType"), (["a dog"], "list")):
        with pytest.raises(TypeError, match=f"^negative_prompt is of type {kind}; accepted: one str for all prompts"):
            pipe.generate("a star", steps=1, negative_prompt=negative)
    ours = {"torch_dtype": "dtype$", "use_safetensors": "none is needed", "safety_checker": "device, dtype, "}
    for key, accepted in ours.items():
        with pytest.raises(TypeError, match=f"{key}= is no keyword of it; accepted: {accepted}"):
            Pipeline.from_pretrained(**{key: None})


def test_a_pipeline_says_what_it_is(pipe, folder):
    size = f"UNet of {sum(p.numel() for p in pipe.unet.parameters()) / 1e6:.1f} million parameters"
    assert repr(pipe) == (
        f"Pipeline(the bundled model: Stable Diffusion, {size}, v_prediction,\n"
        "         images of 64 x 64, torch.float32 on cpu)"
    )
    assert repr(Pipeline.from_pretrained(folder)).startswith(f"Pipeline({folder}: Stable Diffusion, ")


def test_prompts_that_are_cut_are_named_with_what_is_lost(pipe):
    long = "a red circle, " * 30 + "À la CARTE at night!"
    cut = cut_prompts(pipe.tokenizer, ["a star", long])
    assert list(cut) == [long] and cut[long].endswith(", à la carte at night !")
    window = pipe.tokenizer.length - 2
    assert pipe.tokenizer.encode(cut[long]) == pipe.tokenizer.encode(long)[window:]
    assert cut_prompts(pipe.tokenizer, ["a " * window]) == {} != cut_prompts(pipe.tokenizer, ["a " * (window + 1)])
    with pytest.warns(UserWarning, match=f"^1 prompt is cut to {window} tokens: of 'a red .*does not see") as said:
        pipe.generate(["a star", long], steps=1)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a star", steps=1)


def test_seeds_of_64_bits_and_the_global_generator(pipe):
    state = torch.get_rng_state()
    small = pipe.noise([7, (1 << 32) - 1])
    shape = small.shape[1:]
    for row, seed in zip(small, (7, (1 << 32) - 1)):
        assert torch.equal(row, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    large = pipe.noise([7 + (1 << 32), 8 + (1 << 32), 7 + (2 << 32), (1 << 64) - 1])
    rows = [row.numpy().tobytes() for row in [*small, *large]]
    assert len(set(rows)) == len(rows)
    Pipeline.from_pretrained().generate("a star", steps=1)
    assert torch.equal(torch.get_rng_state(), state)


OLD = {  # as in 2022
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "trained_betas": None, "_diffusers_version": "0.4.0",
}  # fmt: skip


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("more", [{}, {"clip_sample": True, "steps_offset": 0}])
def test_old_schedules_are_corrected_as_diffusers_does(pipe, tmp_path, name, more):
    folder = tmp_path / "old"
    pipe.save_pretrained(folder)
    spoil_json(folder / "model_index.json", scheduler=["diffusers", name])
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": name} | OLD | more))
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.schedule.clip is None and pipe.schedule.steps_offset == 1
    pipe.save_pretrained(tmp_path / "again")
    source = json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())
    assert source["_class_name"] == name and {key: source[key] for key in OLD} == OLD
    diffusers = pytest.importorskip("diffusers")
    for place in (folder, tmp_path / "again"):
        peer = diffusers.StableDiffusionPipeline.from_pretrained(place, safety_checker=None)
        peer.set_progress_bar_config(disable=True)
        assert type(peer.scheduler).__name__ == name
        for key in ("clip_sample", "steps_offset", "set_alpha_to_one", "beta_end", "prediction_type"):
            assert pipe.schedule.config[key] == peer.scheduler.config.get(key, pipe.schedule.config[key]), key
        if name == "DDIMScheduler":
            latents, how = pipe.noise([3]), {"height": 64, "width": 64, "guidance_scale": 2.0}
            mine = pipe.generate("a star", steps=10, guidance=2.0, latents=latents)
            theirs = peer("a star", num_inference_steps=10, latents=latents, **how).images
            assert np.abs(np.asarray(mine[0], int) - np.asarray(theirs[0], int)).max() <= 1


@pytest.mark.parametrize(("version", "size"), [("0.8.1", 64), ("0.4.0.dev0", 64), ("0.9.0", 8), ("0.10.2", 8)])
def test_the_image_size_of_old_networks_is_corrected_as_diffusers_does(folder, tmp_path, version, size):
    spoil_json(folder / "unet/config.json", _diffusers_version=version)
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.image_size == (8 * size, 8 * size)
    pipe.save_pretrained(tmp_path / "again")
    assert Pipeline.from_pretrained(tmp_path / "again").image_size == pipe.image_size
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert peer.unet.config.sample_size == size


def test_an_autoencoder_of_its_own(pipe, folder):
    spoil_weights(folder / "vae/diffusion_pytorch_model.safetensors", lambda w: w["decoder.conv_out.bias"].add_(0.2))
    own = Pipeline.from_pretrained(folder).generate("a star", steps=1)[0].tobytes()
    assert own != pipe.generate("a star", steps=1)[0].tobytes()
    for vae in (folder, folder / "vae", folder / "vae/diffusion_pytorch_model.safetensors"):
        assert Pipeline.from_pretrained(vae=vae).generate("a star", steps=1)[0].tobytes() == own
    shutil.move(folder / "vae", folder.parent / "vae")
    assert Pipeline.from_pretrained(folder, vae=folder.parent / "vae").generate("a star", steps=1)[0].tobytes() == own
    with pytest.raises(InputError, match="unet/diffusion_pytorch_model.safetensors: not the autoencoder of Stable"):
        Pipeline.from_pretrained(vae=folder / UNET)


def test_one_file_of_xl_without_its_autoencoder(tmp_path):
    from peers import original_file

    _, path = original_file(tmp_path, "xl")
    how = {"steps": 1, "latents": torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))}
    drawn = Pipeline.from_pretrained(path).generate("a dog", **how)[0].tobytes()
    weights = load_file(path)
    own = {key: weights.pop(key) for key in list(weights) if key.startswith("first_stage_model.")}
    save_file(weights, path)
    with pytest.raises(InputError, match="has no autoencoder .*; give one as vae, accepted: a folder"):
        Pipeline.from_pretrained(path)
    for prefix in ("first_stage_model.", ""):
        other = {key.replace("first_stage_model.", prefix): tensor for key, tensor in own.items()}
        save_file(other | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors")
        pipe = Pipeline.from_pretrained(path, vae=tmp_path / "vae.safetensors")
        assert pipe.generate("a dog", **how)[0].tobytes() == drawn and pipe.vae.scaling_factor == 0.13025
    assert original.vae_component(own, xl=False)[0]["scaling_factor"] == 0.18215

    folder = tmp_path / "again"  # saved by another pipeline of XL, whose steps_offset stays
    pipe.save_pretrained(folder)
    spoil_json(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    assert Pipeline.from_pretrained(folder).generate("a dog", **how)[0].tobytes() == drawn
    spoil_json(folder / "scheduler/scheduler_config.json", clip_sample=True, steps_offset=0)
    schedule = Pipeline.from_pretrained(folder).schedule
    assert schedule.clip is None and schedule.steps_offset == 0


def spoil_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


UNET = "unet/diffusion_pytorch_model.safetensors"


def inpainting(folder: Path) -> None:
    spoil_json(folder / "unet/config.json", in_channels=CHANNELS + 9)
    widen = torch.nn.functional.pad
    spoil_weights(folder / UNET, lambda w: w.update({"conv_in.weight": widen(w["conv_in.weight"], (0, 0, 0, 0, 0, 9))}))


def depth(folder: Path) -> None:
    """LDM3D's autoencoder reads and writes six channels."""
    spoil_json(folder / "vae/config.json", in_channels=6, out_channels=6)

    def widen(weights: dict) -> None:
        weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"].repeat(1, 2, 1, 1)
        for key in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            weights[key] = torch.cat([weights[key]] * 2)

    spoil_weights(folder / "vae/diffusion_pytorch_model.safetensors", widen)


SPOILED = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json: cannot be read"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not JSON"),
    "index a list": (lambda f: (f / "model_index.json").write_text("[]"), "a JSON object is needed"),
    "another network": (
        lambda f: spoil_json(f / "model_index.json", unet=["diffusers", "UNet3D"]),
        "unet is 'UNet3D'; accepted: 'UNet2DConditionModel'",
    ),
    "a config value": (
        lambda f: spoil_json(f / "unet/config.json", act_fn="mish"),
        "unet/config.json: UNet2DConditionModel config: act_fn='mish' is not supported; accepted: 'silu'",
    ),
    "a schedule": (
        lambda f: spoil_json(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "scheduler_config.json: scheduler config: beta_schedule='sigmoid' is not supported",
    ),
    "a schedule of words": (
        lambda f: spoil_json(f / "scheduler/scheduler_config.json", num_train_timesteps="1000"),
        "scheduler_config.json: ",
    ),
    "no levels": (lambda f: spoil_json(f / "unet/config.json", block_out_channels=[]), "unet/config.json: "),
    "no groups": (lambda f: spoil_json(f / "unet/config.json", norm_num_groups=0), "unet/config.json: "),
    "widths of text": (
        lambda f: spoil_json(f / "unet/config.json", cross_attention_dim=[64, 32]),
        "cross_attention_dim=[64, 32] is not supported",
    ),
    "layers of layers": (
        lambda f: spoil_json(f / "unet/config.json", transformer_layers_per_block=[[1], [1]]),
        "transformer_layers_per_block=[[1], [1]] is not supported",
    ),
    "a UNet for inpainting": (
        inpainting,
        f"unet: in_channels is {CHANNELS + 9}; accepted with the other components: {CHANNELS}",
    ),
    "an autoencoder with depth": (depth, "vae: in_channels is 6; accepted with the other components: 3"),
    "a longer tokenizer": (
        lambda f: spoil_json(f / "tokenizer/tokenizer_config.json", model_max_length=99),
        "tokenizer: model_max_length is 99; accepted with the other components: 2 to ",
    ),
    "truncated": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:1000]), f"{UNET}: not a readable"),
    "a missing key": (lambda f: spoil_weights(f / UNET, lambda w: w.pop("conv_in.bias")), "lacks conv_in.bias"),
    "an unexpected key": (
        lambda f: spoil_weights(f / UNET, lambda w: w.update(extra=torch.zeros(1))),
        "has unexpected extra",
    ),
    "a wrong shape": (
        lambda f: spoil_weights(f / UNET, lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
        "conv_in.bias has shape (3,), expected (96,)",
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
    with pytest.raises(TypeError, match="revison= is no keyword of it; accepted: device, "):
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
