"""Adapters: what they compute, that they alone are trained, exact merging, files shared with diffusers."""

import copy
import json

import pytest
import torch
from comparisons import SMALL_UNET
from safetensors.torch import load_file, save_file

from minialign.models.lora import adapters, add_lora, load_lora, merge_lora, save_lora, unmerge_lora
from minialign.models.pretrained import InputError
from minialign.models.unet import UNet

CONFIG = SMALL_UNET | {"block_out_channels": [8, 16]}
X, T, CONTEXT = torch.randn(2, 4, 5, 6), torch.tensor([3, 700]), torch.randn(2, 4, 6)


@torch.enable_grad()
def trained(rank=3, alpha=None) -> UNet:
    """A UNet whose adapters have made a few steps."""
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    optimizer = torch.optim.SGD(add_lora(unet, rank, alpha), lr=30.0)
    for _ in range(2):
        unet(X, T, CONTEXT).square().mean().backward()
        optimizer.step()
    return unet.eval()


@torch.no_grad()
def test_an_adapter_adds_scale_b_a_and_nothing_at_first():
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    before = unet(X, T, CONTEXT)
    add_lora(unet, 3, alpha=6)
    assert torch.equal(unet(X, T, CONTEXT), before)
    layers = adapters(unet)
    attentions = 1 + 1 + 2  # of the level on the way down, the middle, and the level on the way up
    assert len(layers) == attentions * 2 * 4  # to itself and to the text; q, k, v, out
    layer = layers["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]
    layer.lora_B.normal_()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    weight = layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer(x.float()).double(), x @ weight.T + layer.bias, rtol=1e-5, atol=1e-5)


def test_only_the_adapters_are_trained():
    torch.manual_seed(0)
    untouched, unet = UNet(CONFIG).state_dict(), trained()
    state = unet.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in untouched.items())
    learned = [p for p in unet.parameters() if p.requires_grad]
    assert len(learned) == 2 * len(adapters(unet)) and all(p.abs().max() > 0 for p in learned)
    with pytest.raises(ValueError, match="on a UNet without adapters"):
        add_lora(unet, 2)
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(UNet(CONFIG), 0)


@torch.no_grad()
def test_merged_is_the_same_function_and_unmerged_the_same_bits():
    unet = trained(alpha=5)
    before, state = unet(X, T, CONTEXT), copy.deepcopy(unet.state_dict())
    merge_lora(unet)
    assert unet.state_dict().keys() == UNet(CONFIG).state_dict().keys()
    torch.testing.assert_close(unet(X, T, CONTEXT), before, rtol=1e-4, atol=1e-4)
    unmerge_lora(unet)
    after = unet.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(unet(X, T, CONTEXT), before)
    merge_lora(unet)
    unet.double()
    unmerge_lora(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.float64}


@torch.no_grad()
def test_a_saved_adapter_is_read_again(tmp_path):
    unet = trained(alpha=5)
    save_lora(unet, tmp_path / "lora.safetensors")
    torch.manual_seed(0)
    again = UNet(CONFIG)
    load_lora(again, tmp_path / "lora.safetensors")
    torch.testing.assert_close(again(X, T, CONTEXT), unet(X, T, CONTEXT))
    with pytest.raises(ValueError, match="has adapters already"):
        load_lora(again, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no adapters"):
        save_lora(UNet(CONFIG), tmp_path / "none.safetensors")


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"
A, B = torch.randn(3, 16), torch.randn(16, 3)


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        ((f"unet.{LAYER}.to_out.0.lora_A.weight", f"unet.{LAYER}.to_out.0.lora_B.weight"), 1),
        ((f"{LAYER}.to_out.0.lora.down.weight", f"{LAYER}.to_out.0.lora.up.weight"), 1),
        ((f"unet.{LAYER}.processor.to_out_lora.down.weight", f"unet.{LAYER}.processor.to_out_lora.up.weight"), 1),
        ((f"unet.{LAYER}.to_out.0.lora_A.weight", f"unet.{LAYER}.to_out.0.lora_B.weight", "alpha"), 2),
    ],
)
def test_names_of_every_time(tmp_path, names, scale):
    weights = {names[0]: A, names[1]: B}
    if len(names) > 2:
        weights[f"unet.{LAYER}.to_out.0.alpha"] = torch.tensor(6.0)
    save_file(weights, tmp_path / "lora.safetensors")
    unet = UNet(CONFIG)
    load_lora(unet, tmp_path / "lora.safetensors")
    assert list(adapters(unet)) == [f"{LAYER}.to_out.0"]
    layer = adapters(unet)[f"{LAYER}.to_out.0"]
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B) and layer.scale == scale


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_unet_mid_block_attentions_0.lora_down.weight": A}, "is not an adapter of a UNet's linear layer"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": A}, "text_encoder.layers.0.q_proj is not a linear layer"),
        ({"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B}, "conv_in is not a linear layer"),
        ({f"unet.{LAYER}.to_q.lora_A.weight": A}, "to_q has one half of an adapter only"),
        (
            {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B[:5]},
            r"to_q has A (3, 16) and B (5, 3), expected (r,16) and (16,r)",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, weights, message):
    save_file(weights, tmp_path / "lora.safetensors")
    unet = UNet(CONFIG)
    with pytest.raises(InputError) as error:
        load_lora(unet, tmp_path / "lora.safetensors")
    assert message in str(error.value) and "\n" not in str(error.value) and not adapters(unet)


def test_settings_in_the_metadata_that_cannot_be_read(tmp_path):
    weights = {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}
    for settings in ("{", "[]", json.dumps({"unet.lora_alpha": "x"})):
        save_file(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
        with pytest.raises(InputError, match="lora_adapter_metadata cannot be read|alpha of .*to_q cannot be read"):
            load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "has no adapters"),
        (
            {f"unet.{LAYER}.to_q.lora_A.weight": A[:0], f"unet.{LAYER}.to_q.lora_B.weight": B[:, :0]},
            "to_q has A (0, 16)",
        ),
        ({f"unet.{LAYER}.to_q.lora_A.weight": A[0, 0], f"unet.{LAYER}.to_q.lora_B.weight": B}, "to_q has A () and B"),
    ],
)
def test_adapters_of_no_rank(tmp_path, weights, message):
    save_file(weights, tmp_path / "lora.safetensors")
    with pytest.raises(InputError) as error:
        load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")
    assert message in str(error.value)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan"))])
def test_alphas_that_are_none_and_pickles(tmp_path, alpha):
    weights = {f"unet.{LAYER}.to_q.lora_A.weight": A, f"unet.{LAYER}.to_q.lora_B.weight": B}
    save_file(weights | {f"unet.{LAYER}.to_q.alpha": alpha}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="alpha of .*to_q cannot be read"):
        load_lora(UNet(CONFIG), tmp_path / "lora.safetensors")
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pytorch_lora_weights.bin: pickled weights can run code"):
        load_lora(UNet(CONFIG), tmp_path / "pytorch_lora_weights.bin")


def test_diffusers_reads_ours_and_we_read_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from test_checkpoints import assert_same_images, diffusers_pipeline, peer_of

    from minialign import Pipeline

    diffusers_pipeline("sd1").save_pretrained(tmp_path / "model")
    pipe, peer = Pipeline.from_pretrained(tmp_path / "model"), peer_of(tmp_path / "model")
    plain = pipe.generate("a dog", steps=2)[0].tobytes()
    add_lora(pipe.unet, 4, alpha=8)
    for i, layer in enumerate(adapters(pipe.unet).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.5, generator=torch.Generator().manual_seed(i))
    with pytest.raises(ValueError, match="merge_lora"):
        pipe.save_pretrained(tmp_path / "not")
    save_lora(pipe.unet, tmp_path / "pytorch_lora_weights.safetensors")
    peer.load_lora_weights(tmp_path)
    assert pipe.generate("a dog", steps=2)[0].tobytes() != plain
    assert_same_images(pipe, peer)
    merge_lora(pipe.unet)
    assert_same_images(pipe, peer)

    theirs = peer_of(tmp_path / "model")
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    how = {"alpha_pattern": {"attn1.to_q": 32}, "use_rslora": True}
    theirs.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=3, target_modules=projections, init_lora_weights=False, **how)
    )
    theirs.unet.save_lora_adapter(tmp_path / "theirs")
    assert len(load_file(tmp_path / "theirs/pytorch_lora_weights.safetensors")) == 2 * 4 * 2 * 16
    unet = Pipeline.from_pretrained(tmp_path / "model").unet
    frozen = [p for p in unet.parameters()]
    load_lora(unet, tmp_path / "theirs/pytorch_lora_weights.safetensors")
    assert not any(p.requires_grad for p in frozen)
    scales = {layer.scale for name, layer in adapters(unet).items() if name.endswith("attn1.to_q")}
    assert scales == {16.0} and adapters(unet)[f"{LAYER}.to_k"].scale == 1.5
    pipe.unet = unet
    assert_same_images(pipe, theirs)
