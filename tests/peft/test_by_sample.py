# SPDX-License-Identifier: Apache-2.0
"""Adapters mixed in one batch: each sample as if it were alone with its adapter."""

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from peft_models import wrapped
from torch import nn
from torch.testing import assert_close

import fastlora
from fastlora import adapters_by_sample, losses_by_adapter, patch_peft
from fastlora.peft import by_sample

NAMES = ["a", "b", None, "b", "a", "c"]
THEIRS = [name or "__base__" for name in NAMES]  # as PEFT takes them
IDS = torch.arange(6 * 7).reshape(6, 7) % tiny_models.VOCABULARY


def mixed(model=None, p=0.0, targets="all-linear", dtype=torch.float64, **changes):
    """Return a patched model with adapters a, b and c, which all train and do something."""
    model = tiny_models.llama() if model is None else model
    ranks, config = {"a": 4, "b": 2, "c": 3}, {"target_modules": targets, "lora_dropout": p}
    config |= {"init_lora_weights": False, **changes}
    torch.manual_seed(0)
    made = get_peft_model(model, LoraConfig(r=4, **config), adapter_name="a")
    for name in "bc":
        made.add_adapter(name, LoraConfig(r=ranks[name], lora_alpha=5, **config))
    made.set_requires_grad(list(ranks))
    made.to(dtype).train()
    assert patch_peft(made).not_fused == []
    return made


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def grads(model, total):
    """Return gradients by parameter, zero where there is none."""
    named = trained(model)
    of = total, list(named.values())
    found = torch.autograd.grad(*of, allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def alone(model, forward, names=NAMES):
    """Return what each sample's forward makes with its own adapter, one after the other."""
    parts = []
    for i, name in enumerate(names):
        if name is None:
            with model.disable_adapter():
                parts.append(forward(i))
        else:
            model.set_adapter(name)
            model.set_requires_grad(["a", "b", "c"])
            parts.append(forward(i))
    return torch.cat(parts)


def weighted(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


MODELS = {
    "llama": (tiny_models.llama, "all-linear", {"input_ids": IDS}),
    "gpt2": (tiny_models.gpt2, ["c_attn", "c_proj", "c_fc"], {"input_ids": IDS}),
    "bert": (tiny_models.bert, ["query", "value", "dense"], {"input_ids": IDS}),
    "t5": (
        tiny_models.t5,
        ["q", "k", "v", "o", "wi", "wo"],
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
    ),
    "vit": (
        tiny_models.vit,
        "all-linear",
        {"pixel_values": torch.linspace(-2, 2, 6 * 3 * 64).reshape(6, 3, 8, 8).double()},
    ),
}


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_as_each_sample_alone(kind, siblings, fused):
    make, targets, given = MODELS[kind]
    changes = {"modules_to_save": None} if kind in ("bert", "vit") else {}
    model = mixed(make(), targets=targets, **changes).eval()  # some of them drop by themselves
    if kind == "llama":
        given = {**given, "attention_mask": (IDS > 2).long()}  # padded on the left, among others
    if siblings:
        patch_peft(model, fuse_siblings=True)
    right = alone(model, lambda i: model(**{k: v[i : i + 1] for k, v in given.items()}).logits)
    expected = grads(model, weighted(right))
    fused.clear()
    with adapters_by_sample(model, NAMES):
        found = model(**given).logits
    assert_close(found, right)
    assert_close(grads(model, weighted(found)), expected, rtol=1e-6, atol=1e-8)
    assert fused or siblings
    with torch.no_grad():  # and the block leaves nothing behind
        model.set_adapter("b")
        assert_close(model(**{k: v[1:2] for k, v in given.items()}).logits, right[1:2].detach())


def test_layers_share_their_x_here_too(together):
    model = mixed()
    patch_peft(model, fuse_siblings=True)
    with adapters_by_sample(model, NAMES):
        model(input_ids=IDS)
    assert together == [3 + 3 * 5] * 2  # of five runs; and the MLPs are operators of their own


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, p):
    model = mixed(p=p)
    found = []
    for again in (False, True):
        if again:
            model.enable_input_require_grads()
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(5)
        with adapters_by_sample(model, NAMES):
            y = model(input_ids=IDS, use_cache=False).logits
            model.zero_grad()
            weighted(y).backward()
        found.append({n: p.grad for n, p in trained(model).items()})
    assert_close(*found)


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_find_their_own_block(reentrant, siblings):
    """Whose backward may come in another one, or outside."""
    model = mixed()
    patch_peft(model, fuse_siblings=siblings)
    orders, found, own = (NAMES, NAMES[::-1]), [], by_sample.CHECKPOINT
    for again in (False, True):
        if again:
            model.enable_input_require_grads()
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.zero_grad()
        ys, functions = [], [vars(m).get(own) for m in model.modules()]
        for names in orders:
            with adapters_by_sample(model, names):
                ys.append(model(input_ids=IDS, use_cache=False).logits)
                if len(ys) == 2:
                    weighted(ys[0]).backward()
        assert [vars(m).get(own) for m in model.modules()] == functions
        weighted(ys[1]).backward()
        found.append({n: p.grad for n, p in trained(model).items()})
    assert_close(*found)
    assert not any(getattr(m, "_by_sample", None) for m in model.modules())


@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_another_checkpoint_outside_of_the_block_is_an_error(reentrant, siblings, monkeypatch):
    model = mixed()
    patch_peft(model, fuse_siblings=siblings)
    model.enable_input_require_grads()
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    monkeypatch.setattr("fastlora.peft.by_sample.CHECKPOINT", "another's")
    with adapters_by_sample(model, NAMES):
        y = model(input_ids=IDS, use_cache=False).logits
    with pytest.raises(RuntimeError, match="backward has to be inside of its block too"):
        weighted(y).backward()
    model.set_adapter("a")
    weighted(model(input_ids=IDS, use_cache=False).logits).backward()  # without mixing


def test_losses_are_those_of_each_adapter_alone():
    """The gradients as well, though the tokens of the samples are not the same number."""
    model, names = mixed(), ["a", "b", "b", "a", "a", "c"]
    labels = IDS.clone()
    labels[0, :5] = labels[4, 2:] = -100
    with adapters_by_sample(model, names):
        losses = losses_by_adapter(model(input_ids=IDS).logits, labels, names)
    found = grads(model, sum(losses.values()))
    for name in "abc":
        of = [i for i, other in enumerate(names) if other == name]
        model.set_adapter(name)
        own = model(input_ids=IDS[of], labels=labels[of]).loss
        assert_close(losses[name].double(), own.double(), rtol=1e-5, atol=1e-6)
        right = {n: g for n, g in grads(model, own).items() if f".{name}." in n}
        assert_close({n: found[n] for n in right}, right, rtol=1e-4, atol=1e-6)


def test_runs_of_tokens():
    """Packed, in a model without a dimension of samples."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model = mixed(model, targets=["0", "2"])
    x, lengths, names = torch.randn(10, 8, dtype=torch.float64), [3, 0, 5, 2], ["a", "c", None, "b"]
    with adapters_by_sample(model, names, lengths=lengths):
        found = model(x)
    parts = x.split(lengths)
    right = alone(model, lambda i: model(parts[i]), names)
    assert_close(found, right)
    assert_close(grads(model, weighted(found)), grads(model, weighted(right)))


@pytest.mark.parametrize("beams", [1, 3])
def test_generating(beams):
    model = mixed().eval()
    given = {"input_ids": IDS[:, :3], "max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    given |= {"attention_mask": torch.ones_like(IDS[:, :3]), "pad_token_id": 0}
    with adapters_by_sample(model, NAMES):
        found = model.generate(**given)
    assert torch.equal(found, model.generate(**given, adapter_names=THEIRS))
    fastlora.unpatch_peft(model)
    assert torch.equal(found, model.generate(**given, adapter_names=THEIRS))


def test_pefts_own_way_is_fused(fused):
    model = mixed().eval()
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=THEIRS).logits
        assert len(fused) == 14
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
            model(input_ids=IDS, adapter_names=THEIRS[1:])
        fastlora.unpatch_peft(model)
        assert_close(found, model(input_ids=IDS, adapter_names=THEIRS).logits)


def test_quantised_weights_autocast_and_compiled_models():
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def packed():
        layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
        weight = torch.randn(32, 64)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer).to("cpu")
        return layer

    x = torch.randn(6, 3, 64)
    for make in (packed, lambda: nn.Linear(64, 32, bias=False)):
        base = nn.Sequential(make())
        base.is_loaded_in_4bit = make is packed
        model = mixed(base, targets=["0"], dtype=torch.float32)
        right = alone(model, lambda i, model=model: model(x[i : i + 1]))
        with torch.no_grad(), adapters_by_sample(model.eval(), NAMES):
            assert_close(model(x), right)
        with adapters_by_sample(model, NAMES):
            found = model(x)
            compiled = torch.compile(model, backend="eager")(x)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = None if make is packed else model(x)
        assert_close([found, compiled], [right] * 2)
        if rounded is not None:
            assert_close(rounded, right.bfloat16(), rtol=0.05, atol=0.05)


WRONG = [
    (["a"] * 5, {}, ValueError, r"given 5 names, and a layer gets \(6, 7, 16\), whose first"),
    (["a", "x"] * 3, {}, ValueError, r"names must be of adapters \(a, b, c\), got \['x'\]"),
    ("abcabc", {}, TypeError, "names must hold a str or None for each sample, got 'abcabc'"),
    ([1] * 6, {}, TypeError, r"names must hold a str or None for each sample, got \[1, 1"),
    ([], {}, ValueError, "names must hold one for each sample, got none"),
    (
        ["a", "b"],
        {"lengths": [20, 20]},
        ValueError,
        "lengths of 40 tokens in all, and a layer gets 42",
    ),
    (
        ["a", "b"],
        {"lengths": [42]},
        ValueError,
        r"lengths must hold a number .* 2 names, got \[42\]",
    ),
    (["a", "b"], {"lengths": [50, -8]}, ValueError, "lengths must hold a number of tokens"),
]


@pytest.mark.parametrize(("names", "more", "error", "message"), WRONG)
def test_wrong_names(names, more, error, message):
    model = mixed()
    model.set_adapter("a")
    before = model(input_ids=IDS).logits
    with pytest.raises(error, match=message), adapters_by_sample(model, names, **more):
        model(input_ids=IDS)
    assert torch.equal(model(input_ids=IDS).logits, before)  # no names are left behind


def test_models_that_cannot_mix():
    names = ["a"] * 6
    with adapters_by_sample(model := mixed(), names):
        inner = adapters_by_sample(model, names)
        with pytest.raises(ValueError, match="inside of another block of the same model"), inner:
            pass
    with pytest.raises(ValueError, match="got 2 names, 6 rows of labels and 6 of logits"):
        losses_by_adapter(model(input_ids=IDS).logits, IDS, ["a", "b"])
    with (
        pytest.raises(ValueError, match="has no fused layer: patch_peft"),
        adapters_by_sample(wrapped(), names),
    ):
        pass
    model = mixed()
    model.merge_adapter(["b"])
    with (
        pytest.raises(ValueError, match=r"q_proj has merged adapters: unmerge_adapter\(\) first"),
        adapters_by_sample(model, names),
    ):
        pass
    model = mixed(modules_to_save=["lm_head"], targets=["q_proj"])
    with (
        pytest.raises(ValueError, match=r"lm_head is trained in full \(modules_to_save\)"),
        adapters_by_sample(model, names),
    ):
        pass
    model = mixed(targets=["q_proj"])
    model.add_adapter("d", LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=False))
    with adapters_by_sample(model, names):  # another adapter's parts do not matter
        model(input_ids=IDS)
    with (
        pytest.raises(ValueError, match="embed_tokens is a Embedding, not fused"),
        adapters_by_sample(model, ["d"] * 6),
    ):
        pass
    with adapters_by_sample(model, names), model.disable_adapter():
        y = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(y, model(input_ids=IDS).logits)


@pytest.mark.parametrize("impl", ["library", "triton"])
def test_the_kernels_take_mixed_batches(impl, monkeypatch):
    """As on a GPU: layers alone, siblings and gated MLPs, nothing by library products for CPUs."""
    model = mixed(dtype=torch.float32)
    patch_peft(model, fuse_siblings=True)
    right = alone(model, lambda i: model(IDS[i : i + 1]).logits)
    expected = grads(model, weighted(right))
    monkeypatch.setattr("fastlora.operator.plans.FORCED", impl)
    monkeypatch.setattr("fastlora.operator.blocks.shrink", None)
    with adapters_by_sample(model, NAMES):
        found = model(IDS).logits
    assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert_close(grads(model, weighted(found)), expected, rtol=1e-3, atol=1e-3)
