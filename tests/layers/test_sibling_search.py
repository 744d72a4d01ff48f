# SPDX-License-Identifier: Apache-2.0
"""Siblings are found in models of every kind, and said; what can't be found is said as well."""

import copy
import functools
from collections import UserList

import peft_models
import pytest
import torch
import transformers
from sibling_models import QKV, Block, X, close, results, wrapped
from test_stacks import loss_of
from tiny_models import VOCABULARY, bits, llama, same, vit
from torch import nn

import fastlora
from fastlora import patch_peft
from fastlora.layers.siblings import find

adapted = functools.partial(peft_models.wrapped, target_modules="all-linear")


@pytest.mark.parametrize("how", [{"x": X}, X, [QKV], UserList([list(QKV)])], ids=str)
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


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZES["num_attention_heads"] = 2
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, **TOKENS}
PAIR |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}
BANDS = {"num_mel_bins": 8, "max_source_positions": 20, "decoder_start_token_id": 1}
THREE, TWO = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")
BOTH = {"text_config": {**SIZES, **TOKENS}, "vision_config": IMAGES}
# A class's name, what its config is given and the groups that it has.
KINDS = [
    ("ViTModel", {**IMAGES, "image_size": (8, 4)}, [THREE]),
    ("VideoMAEModel", {**IMAGES, "num_frames": 4}, [("key", "value", "query")]),
    ("CLIPModel", BOTH, [THREE] * 2),
    ("WhisperForConditionalGeneration", {**PAIR, **BANDS}, [THREE, THREE, TWO]),
    (  # a spectrogram the other way round
        "Speech2TextForConditionalGeneration",
        {**PAIR, "conv_channels": 16, "input_feat_per_channel": 8},
        [THREE, THREE, TWO],
    ),
    ("ASTModel", {**SIZES, "num_mel_bins": 16, "max_length": 24, "patch_size": 8}, [THREE]),
    ("Wav2Vec2Model", {**SIZES, **CONVOLUTIONS}, [THREE]),
    ("BartForSequenceClassification", PAIR, [THREE, THREE, TWO]),
    ("GPTNeoXForSequenceClassification", {**SIZES, **TOKENS}, []),  # no padding
]


@pytest.mark.parametrize(("name", "sizes", "groups"), KINDS)
def test_an_input_is_made_by_what_a_model_says(name, sizes, groups):
    kind = getattr(transformers, name)
    model = adapted(kind(kind.config_class(**sizes)).bfloat16())
    report = patch_peft(model, fuse_siblings=True)
    assert sorted(names for _, names in report.siblings) == sorted(groups)


class Says(Block):
    def forward(self, x, scale, twice):
        return super().forward(x * scale * (1 + twice))


def test_what_a_model_says_need_not_be_batches_of_tensors(monkeypatch):
    own = {"x": X, "scale": torch.tensor(2.0), "twice": True, "other": None}
    monkeypatch.setattr(Says, "dummy_inputs", own, raising=False)
    report = patch_peft(adapted(Says(), target_modules=["q"]), fuse_siblings=True)
    assert [names for _, names in report.siblings] == [QKV]
    monkeypatch.setattr(Says, "dummy_inputs", [X])
    with pytest.raises(ValueError, match="Says says of no input"):
        patch_peft(adapted(Says(), target_modules=["q"]), fuse_siblings=True)


def test_a_model_of_two():
    """An encoder of images and a decoder of text, which each say a part."""
    bert = {**SIZES, "vocab_size": VOCABULARY, "is_decoder": True, "add_cross_attention": True}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**bert))
    model = transformers.VisionEncoderDecoderModel(encoder=vit().vit, decoder=decoder)
    report = patch_peft(
        adapted(model, target_modules=["q_proj", "query", "key"]), fuse_siblings=True
    )
    of_text = ("query", "key", "value"), ("key", "value")
    assert {names for _, names in report.siblings} == {THREE, *of_text}


WRONG = [
    (True, ValueError, r"says of no input .*; give another.*fuse_siblings=\[\('q', 'k', 'v'\)"),
    ({"y": X}, ValueError, "raised TypeError on the example input .*'y'"),
    (torch.ones(2, 5), ValueError, r"raised RuntimeError on the .*\[\('q', 'k', 'v'\)\]"),
    ([("q", "w")], ValueError, r"no module has linear layers named \('q', 'w'\)"),
    ([("q",)], ValueError, "groups of two names or more"),
    ([("q", "k"), ("k", "v")], ValueError, "each in one group only"),
    *(
        (how, TypeError, "must be True, an example input .* got ")
        for how in ("q", 3, [], [[]], [5], [("q", ["k"])], ["qk"])
    ),
]


@pytest.mark.parametrize(("how", "kind", "said"), WRONG, ids=str)
def test_wrong_ways_to_say_which(how, kind, said):
    model = wrapped()
    before = bits(model)
    with pytest.raises(kind, match=said):
        patch_peft(model, fuse_siblings=how)
    assert same(before, bits(model))


def test_an_error_names_only_what_the_model_has():
    model = adapted(vit())
    with pytest.raises(ValueError, match="raised") as error:
        patch_peft(model, fuse_siblings={"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    assert f"fuse_siblings={[THREE]}" in str(error.value)
    model = adapted(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"])
    with pytest.raises(ValueError, match="says of no input") as error:
        patch_peft(model, fuse_siblings=True)
    assert "such as" not in str(error.value)
    assert patch_peft(model, fuse_siblings=X).siblings == []  # none is no error


def test_one_layer_under_two_names_and_a_sibling_trained_in_full():
    model = Block()
    model.k = model.q
    with pytest.raises(ValueError, match="no module has linear layers named"):
        find(model, [("q", "k")], [model.q])
    model = wrapped(modules_to_save=["k"])
    report = patch_peft(model, fuse_siblings={"x": X})
    assert report.siblings == [("base_model.model", ("q", "v"))]
    results(model.base_model.model)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_unloaded_models_are_plain(how):
    """No class and no group of ours is left, also of a gated MLP that only down had made one."""
    plain, patched = (adapted(llama(), target_modules=["q_proj", "down_proj"]) for _ in range(2))
    report = patch_peft(patched, fuse_siblings=True)
    assert [names for _, names in report.siblings] == [THREE] * 2
    assert [names for _, names in report.gated_mlps] == [("gate_proj", "up_proj", "down_proj")] * 2
    assert "  siblings: q_proj, k_proj, v_proj x2\n  gated MLP: gate_proj, up" in str(report)
    models = [getattr(model, how)() for model in (plain, patched, copy.deepcopy(patched))]
    for model in models[1:]:
        peft_models.same_kinds(model, models[0])
        close([loss_of(model)], [loss_of(models[0])])
    with pytest.raises(ValueError, match=r"holds no LoRALinear .* what was merged runs as a plain"):
        fastlora.explain(models[1])
