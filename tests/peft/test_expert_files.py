# SPDX-License-Identifier: Apache-2.0
"""Files of experts' adapters: in PEFT's layout, and with keys for each expert as servers read."""

import copy
import json

import peft
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from expert_models import BOTH, config, loss_of, wrapped
from safetensors.torch import load_file, save_file

import fastlora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = {"Mixtral": ("w1", "w3", "w2"), "Qwen3Moe": ("gate_proj", "up_proj", "down_proj")}
ABOVE = {"Mixtral": "block_sparse_moe", "Qwen3Moe": "mlp"}
KEY = "base_model.model.model.layers.{}.{}.experts.{}.{}.lora_{}.weight"
PARTS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 7}}


def saved(folder, name="Qwen3Moe", **changes):
    """Return a model, and what a file with keys for each of its experts holds."""
    model = wrapped(name, **changes)
    fastlora.save_adapter(model, folder, per_expert=True)
    return model, load_file(folder / WEIGHTS)


def base(name="Qwen3Moe"):
    return tiny.experts(name).double()


def written(folder, tensors, **changes):
    """Write other tensors, or another config, to a folder."""
    values = json.loads((folder / CONFIG).read_text())
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values | changes))
    return folder


@pytest.mark.parametrize("changes", [{}, PARTS, {"use_rslora": True}, {"parameters": BOTH[1:]}])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name, changes, tmp_path):
    model, tensors = saved(tmp_path, name, **changes)
    experts = len(model.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj)
    one = 1 if "parameters" in changes else 3
    assert sum(".experts." in key for key in tensors) == 2 * experts * one * 2
    assert json.loads((tmp_path / CONFIG).read_text())["target_parameters"] is None
    expected = loss_of(model)
    loaded = fastlora.load_adapter(base(name), tmp_path)
    torch.testing.assert_close(loss_of(loaded), expected)
    own = loaded.base_model.model.model.layers[0].mlp.experts
    assert type(own).__module__ == "fastlora.peft.linear"
    if not changes:  # the same values, not only the same function
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, dict(loaded.named_parameters())[key])


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_is_a_plain_adapter(name, tmp_path):
    """What a server computes with what it reads."""
    model, tensors = saved(tmp_path, name)
    layer = model.base_model.model.model.layers[1].mlp.experts
    own, gate_up, (w1, w3, w2) = layer.get_base_layer(), layer.base_layer, NAMES[name]
    values = json.loads((tmp_path / CONFIG).read_text())
    assert {w1, w2, w3, "q_proj"} == {*values["target_modules"]}
    scaling = values["lora_alpha"] / values["r"]
    x = torch.randn(5, 16, dtype=torch.float64)
    assert gate_up.parameter_name == "gate_up_proj"

    def projected(x, weight, e, part):
        a, b = (tensors[KEY.format(1, ABOVE[name], e, part, of)] for of in "AB")
        return F.linear(x, weight) + scaling * x @ a.t() @ b.t()

    for e in range(2):
        w = own.gate_up_proj[e].chunk(2)
        gate, up = (projected(x, *of) for of in ((w[0], e, w1), (w[1], e, w3)))
        y = projected(own.act_fn(gate) * up, own.down_proj[e], e, w2)
        index, weights = torch.full((5, 1), e), torch.ones(5, 1, dtype=torch.float64)
        torch.testing.assert_close(y, layer(x, index, weights))


def test_peft_reads_it_too(tmp_path):
    model, _ = saved(tmp_path)
    found = peft.PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loss_of(found), loss_of(model))


def test_parts_of_one_weight_may_have_adapters_of_their_own(tmp_path):
    """As in files from before transformers joined the weights."""
    _, tensors = saved(tmp_path)
    torch.manual_seed(5)
    tensors = {key: torch.randn_like(t) / 3 for key, t in tensors.items()}
    written(tmp_path, tensors)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    ours = fastlora.load_adapter(base(), tmp_path)
    torch.testing.assert_close(loss_of(ours), loss_of(theirs))
    layer = ours.base_model.model.model.layers[0].mlp.experts.base_layer
    assert layer.lora_A["default"].weight.shape == (6 * 2 * 3, 16)  # both ranks of six experts


def test_beside_another_adapter_of_linear_layers(tmp_path):
    model, _ = saved(tmp_path)
    other = peft.get_peft_model(base(), config(parameters=(), target_modules=["k_proj"]))
    loaded = fastlora.load_adapter(other, tmp_path, "experts")
    loaded.set_adapter("experts")
    torch.testing.assert_close(loss_of(loaded), loss_of(model))


def test_experts_that_are_modules_are_as_any_others(tmp_path):
    def made():
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"experts": torch.nn.ModuleList([tiny.MLP(), tiny.MLP()])})

    model = peft.get_peft_model(made(), config((), target_modules=["up"]))
    fastlora.save_adapter(model, tmp_path)
    loaded = fastlora.load_adapter(made(), tmp_path)
    own, other = (m.get_submodule("base_model.model.experts.1.up") for m in (model, loaded))
    assert torch.equal(own.lora_A["default"].weight, other.lora_A["default"].weight)


def test_experts_without_names_of_their_own_are_refused(tmp_path):
    model = wrapped("GptOss")
    with pytest.raises(ValueError, match=r"per_expert: .*experts\.\w+ has no names for"):
        fastlora.save_adapter(model, tmp_path / "new", per_expert=True)
    assert not (tmp_path / "new").exists()


def broken(tensors, how):
    key = KEY.format(0, "mlp", 2, "up_proj", "A")
    if how == "missing":
        del tensors[key]
    elif how == "size":
        tensors[key] = tensors[key][:2].clone()
    elif how == "dtype":
        tensors[key] = tensors[key].half()
    elif how == "nan":
        tensors[key][0] = torch.nan
    elif how == "another":
        tensors[KEY.format(0, "mlp", 17, "up_proj", "A")] = tensors[key].clone()
    elif how == "nowhere":
        tensors[KEY.format(7, "mlp", 0, "up_proj", "A")] = tensors[key].clone()
    elif how == "width":
        for e in range(6):
            one = KEY.format(0, "mlp", e, "down_proj", "B")
            tensors[one] = torch.cat([tensors[one]] * 2)
    elif how == "rank":
        for e in range(6):
            one = KEY.format(0, "mlp", e, "down_proj", "B")
            tensors[one] = tensors[one][:, :2].clone()


WRONG = {
    "missing": r"mlp.experts, which has experts by themselves, lacks \(2, 'up_proj', 'A'\)",
    "size": "experts differ in the sizes or dtypes of up_proj.lora_A",
    "dtype": "experts differ in the sizes or dtypes of up_proj.lora_A",
    "nan": "NaN or infinity in",
    "another": r"layers.0.mlp.experts has parts that the model lacks: \(17, 'up_proj', 'A'\)",
    "nowhere": "layers.7.mlp.experts, which has experts by themselves, is not of this model",
    "width": "must be",
    "rank": "lora_A and lora_B of experts' down_proj do not fit together",
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_is_refused(how, tmp_path):
    _, tensors = saved(tmp_path)
    broken(tensors, how)
    written(tmp_path, tensors)
    model = base()
    before = tiny.bits(model)
    with pytest.raises(ValueError, match=WRONG[how]):
        fastlora.load_adapter(model, tmp_path)
    assert tiny.same(before, tiny.bits(model))


def test_the_layout_of_older_releases_is_not_misread(tmp_path):
    model = wrapped()
    fastlora.save_adapter(model, tmp_path)
    tensors, swapped = load_file(tmp_path / WEIGHTS), {}
    for key, t in tensors.items():
        other = (
            key.replace("lora_A", "lora_").replace("lora_B", "lora_A").replace("lora_.", "lora_B.")
        )
        swapped[key] = tensors[other].t().contiguous() if ".experts." in key else t
    written(tmp_path, swapped, peft_version="0.18.0")
    with pytest.raises(ValueError, match="as model and config say"):
        fastlora.load_adapter(base(), tmp_path)


@pytest.mark.parametrize("version", ["0.18.0", "0.19.0", None])
def test_a_square_layout_of_unknown_origin_is_refused(version, tmp_path):
    sizes = {**tiny.EXPERTS["Qwen3Moe"], "moe_intermediate_size": 16}
    model = tiny.decoder("Qwen3Moe", **sizes).double()
    made = peft.get_peft_model(copy.deepcopy(model), config(BOTH[1:]), autocast_adapter_dtype=False)
    fastlora.save_adapter(made, tmp_path)
    fastlora.load_adapter(copy.deepcopy(model), tmp_path)  # of this release it is known
    written(tmp_path, load_file(tmp_path / WEIGHTS), peft_version=version)
    with pytest.raises(ValueError, match="is square, and written by PEFT"):
        fastlora.load_adapter(model, tmp_path)
