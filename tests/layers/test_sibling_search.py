# SPDX-License-Identifier: Apache-2.0
"""Siblings are found in models of every kind, and said; what can't be found is said as well."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_siblings import QKV, Block, X, close, results, wrapped
from test_stacks import ATTENTION, MODELS, loss_of
from tiny_models import VOCABULARY, bits, llama, same, vit
from torch import nn

import fastlora
from fastlora import patch_peft
from fastlora.layers.siblings import find


def adapted(model, targets="all-linear", **changes):
    torch.manual_seed(3)
    asked = {"r": 3, "init_lora_weights": False, "target_modules": targets, **changes}
    return get_peft_model(model, LoraConfig(**asked))


@pytest.mark.parametrize("how", [{"x": X}, X, [QKV], [["q", "k", "v"]]], ids=str)
def test_ways_to_say_which(how, together):
    plain, model = wrapped(), wrapped()
    report = patch_peft(model, fuse_siblings=how)
    assert report.siblings == [("base_model.model", QKV)]
    assert "  siblings: q, k, v\n" in f"{report}\n"
    close(results(model.base_model.model), results(plain.base_model.model))
    assert together == [3]


def test_finding_them_leaves_the_model_as_it_was():
    """No mode, no random number, no hook and no gradient is left behind."""
    model = llama()
    model.model.layers[0].train()
    before, state = bits(model), torch.get_rng_state()
    found = find(model, True, [model.model.layers[0].self_attn.q_proj])
    assert [group.names for group in found] == [("q_proj", "k_proj", "v_proj")]
    assert same(before, bits(model)) and torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


# GPT-2 and Phi-3 have one layer each for what others have siblings for.
ALONE = ("GPT-2", "Phi3")
GATED = ("Llama", "Qwen2", "Qwen3", "Gemma", "Gemma3", "Mistral")
DIFFUSION = {
    "hidden_states": torch.zeros(1, 4, 8, 8, dtype=torch.float64),
    "timestep": torch.tensor([1]),
    "class_labels": torch.tensor([1]),
}


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, together):
    """PEFT's own losses and gradients: in float64, where rounding hides nothing."""
    targets = ATTENTION if name == "diffusion" else "all-linear"
    plain = adapted(MODELS[name]().double(), targets)
    model = copy.deepcopy(plain)
    report = patch_peft(model, fuse_siblings=DIFFUSION if name == "diffusion" else True)
    assert len(report.gated_mlps) == 2 * (name.split()[0] in GATED)
    (loss, grads), (plain_loss, plain_grads) = (step(each, name) for each in (model, plain))
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-9)
    assert (grads - plain_grads).norm() <= 1e-10 * plain_grads.norm()
    assert bool(together) != (name in ALONE)


def step(model, name):
    """Return the loss of a step, and every gradient in one vector."""
    kept = []
    handle = model.register_forward_hook(lambda module, args, y: kept.append(y))
    loss = loss_of(AsDouble(model), name)
    handle.remove()
    if name != "diffusion":  # transformers computes losses in float32
        logits = kept[0].logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        loss = (logits.flatten() * weights).sum()
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


class AsDouble:
    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        args = [a.double() if a.is_floating_point() else a for a in args]
        kwargs = {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()}
        return self.model(*args, **kwargs)


# What models of transformers say of their inputs

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES["num_attention_heads"] = 2
PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
PAIR |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
PAIR |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 8, "patch_size": 4}
THREE, TWO = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")
# A class's name, what its config is given and the groups that it has.
KINDS = {
    "one channel": ("ViTModel", {**SIZES, "image_size": (8, 4), "patch_size": 4}, [THREE]),
    "video": ("VideoMAEModel", {**SIZES, **IMAGES, "num_frames": 4}, [("key", "value", "query")]),
    "image and text": (
        "CLIPModel",
        {"text_config": {**SIZES, **TOKENS}, "vision_config": {**SIZES, **IMAGES}},
        [THREE] * 2,
    ),
    "spectrogram and text": (
        "WhisperForConditionalGeneration",
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 20, "decoder_start_token_id": 1},
        [THREE, THREE, TWO],
    ),
    "the other way round": (
        "Speech2TextForConditionalGeneration",
        {**PAIR, "conv_channels": 16, "input_feat_per_channel": 8},
        [THREE, THREE, TWO],
    ),
    "patches of a spectrogram": (
        "ASTModel",
        {**SIZES, "num_mel_bins": 16, "max_length": 24, "patch_size": 8},
        [THREE],
    ),
    "sound": ("Wav2Vec2Model", {**SIZES, **CONVOLUTIONS}, [THREE]),
    "text and text": ("BartForSequenceClassification", PAIR, [THREE, THREE, TWO]),
    "no padding": ("GPTNeoXForSequenceClassification", {**SIZES, **TOKENS}, []),
}


@pytest.mark.parametrize(("name", "sizes", "groups"), KINDS.values(), ids=KINDS)
def test_an_input_is_made_by_what_a_model_says(name, sizes, groups):
    kind = getattr(transformers, name)
    model = adapted(kind(kind.config_class(**sizes)).bfloat16())
    report = patch_peft(model, fuse_siblings=True)
    assert sorted(names for _, names in report.siblings) == sorted(groups)


def test_a_model_of_two():
    """An encoder of images and a decoder of text, which each say a part."""
    bert = {**SIZES, "vocab_size": VOCABULARY, "is_decoder": True, "add_cross_attention": True}
    model = transformers.VisionEncoderDecoderModel(
        encoder=vit().vit, decoder=transformers.BertLMHeadModel(transformers.BertConfig(**bert))
    )
    report = patch_peft(adapted(model, ["q_proj", "query", "key"]), fuse_siblings=True)
    assert {names for _, names in report.siblings} == {
        THREE,
        ("query", "key", "value"),
        ("key", "value"),
    }


# What can't be found


class Alone(nn.Module):
    """No siblings, and no word about its input."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x):
        return self.q(x)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        (True, ValueError, r"says of no input .*; give another.*fuse_siblings=\[\('q', 'k', 'v'\)"),
        ({"y": X}, ValueError, "raised TypeError on the example input .*'y'"),
        (torch.ones(2, 5), ValueError, r"raised RuntimeError on the .*\[\('q', 'k', 'v'\)\]"),
        ([("q", "w")], ValueError, r"no module has linear layers named \('q', 'w'\)"),
        ([("q",)], ValueError, "groups of two names or more"),
        ([("q", "k"), ("k", "v")], ValueError, "each in one group only"),
        ("q", TypeError, "must be True, an example input .* got 'q'"),
        (3, TypeError, "must be True, an example input .* got 3"),
        ([], TypeError, r"must be True, an example input .* got \[\]"),
        ([[]], TypeError, "must be True, an example input"),
    ],
    ids=str,
)
def test_wrong_ways_to_say_which(how, kind, said):
    model = wrapped()
    before = bits(model)
    with pytest.raises(kind, match=said):
        patch_peft(model, fuse_siblings=how)
    assert same(before, bits(model))


def test_an_error_names_only_what_the_model_has():
    model = adapted(nn.Sequential(Alone()), ["q"])
    with pytest.raises(ValueError, match="says of no input") as error:
        patch_peft(model, fuse_siblings=True)
    assert "such as" not in str(error.value)
    model = adapted(vit())
    with pytest.raises(ValueError, match="raised") as error:
        patch_peft(model, fuse_siblings={"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    assert f"fuse_siblings={[THREE]}" in str(error.value)


def test_no_siblings_are_no_error():
    model = adapted(nn.Sequential(Alone()), ["q"])
    assert patch_peft(model, fuse_siblings=X).siblings == []


def test_one_layer_under_two_names():
    model = Block()
    model.k = model.q
    with pytest.raises(ValueError, match="no module has linear layers named"):
        find(model, [("q", "k")], [model.q])


def test_a_sibling_trained_in_full():
    model = wrapped(modules_to_save=["k"])
    report = patch_peft(model, fuse_siblings={"x": X})
    assert report.siblings == [("base_model.model", ("q", "v"))]
    results(model.base_model.model)


# Models that are unloaded


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("copied", [False, True])
def test_unloaded_models_are_plain(how, copied):
    """No class and no group of ours is left, also of a gated MLP that only down had made one."""
    plain, patched = (adapted(llama(), ["q_proj", "down_proj"]) for _ in range(2))
    report = patch_peft(patched, fuse_siblings=True)
    assert [names for _, names in report.siblings] == [THREE] * 2
    assert [names for _, names in report.gated_mlps] == [("gate_proj", "up_proj", "down_proj")] * 2
    assert "  siblings: q_proj, k_proj, v_proj x2\n  gated MLP: gate_proj, up" in str(report)
    if copied:
        patched = copy.deepcopy(patched)
    plain, patched = (getattr(model, how)() for model in (plain, patched))
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in patched.modules()] == [vars(m).keys() for m in plain.modules()]
    close([loss_of(patched)], [loss_of(plain)])
    with pytest.raises(ValueError, match=r"holds no LoRALinear .* what was merged runs as a plain"):
        fastlora.explain(patched)
