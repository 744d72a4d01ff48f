# SPDX-License-Identifier: Apache-2.0
"""PEFT models of every kind, and by what people train them: patched, their losses are the same."""

import copy
from functools import partial

import pytest
import tiny_models as tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from peft_models import config, layers, pair

from fastlora import patch_peft

STEPS = 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DECODERS = {"Qwen2": {}, "Qwen3": {"head_dim": 4}, "Gemma": {"head_dim": 4}, "Mistral": {}}
DECODERS |= {"Gemma3": {"head_dim": 4}, "Phi": {}, "Phi3": {"eos_token_id": 1}}
MODELS = {name: partial(tiny.decoder, name, **changes) for name, changes in DECODERS.items()}
MODELS |= {"Llama": tiny.llama, "GPT-2": tiny.gpt2, "BERT": tiny.bert, "T5": tiny.t5}
MODELS |= {"ViT": tiny.vit, "diffusion": tiny.diffusion_transformer}
ALONE = ("GPT-2", "Phi3")  # have one layer each for what others have siblings for
GATED = ("Llama", "Qwen2", "Qwen3", "Gemma", "Gemma3", "Mistral")
DIFFUSION = {"hidden_states": torch.zeros(1, 4, 8, 8, dtype=torch.float64)}
DIFFUSION |= dict.fromkeys(("timestep", "class_labels"), torch.tensor([1]))


def loss_of(model, name="Llama"):
    if name == "diffusion":
        given = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
        noise = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        return (model(noise, **given).sample ** 2).mean()
    if name == "ViT":
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        return model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
    labels = torch.tensor([0, 2]) if name == "BERT" else tiny.tokens()
    return model(input_ids=tiny.tokens(), labels=labels).loss


@pytest.fixture
def float64(monkeypatch):
    """New tensors are of it, and what transformers would compute in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, float64, fused, together):
    """PEFT's losses and gradients, also of siblings: in float64, where rounding hides nothing."""
    targets, how = (ATTENTION, DIFFUSION) if name == "diffusion" else ("all-linear", True)
    plain, model, report = pair(MODELS[name]().double(), target_modules=targets)
    siblings = copy.deepcopy(model)
    assert report.not_fused == []
    assert len(patch_peft(siblings, fuse_siblings=how).gated_mlps) == 2 * (name in GATED)
    found = []
    fused.clear()  # of the forward that has found them
    for each in (plain, model, siblings):
        loss = loss_of(each, name)
        grads = torch.autograd.grad(loss, [p for p in each.parameters() if p.requires_grad])
        found.append((loss.item(), torch.cat([grad.flatten() for grad in grads])))
        if each is model:
            assert len(fused) == len(layers(model)) > 0
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-9)
        assert (grads - found[0][1]).norm() <= 1e-10 * found[0][1].norm()
    assert bool(together) != (name in ALONE)


# Trainers: each returns the losses of STEPS steps of two batches
def rows(**columns):
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, tiny.VOCABULARY, (4 * STEPS, 6), generator=generator).tolist()
    return [{"input_ids": row, **{name: of(row) for name, of in columns.items()}} for row in ids]


def trained(kind, model, arguments, folder, changes, data, **options):
    asked = {"output_dir": str(folder), "max_steps": STEPS, "learning_rate": 1e-2}
    asked |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    asked |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    asked |= {"bf16": False, "save_strategy": "no", **changes}
    trainer = kind(model, arguments(**asked), train_dataset=data, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_transformers(model, folder, **changes):
    data = rows(labels=list, attention_mask=lambda row: [1] * len(row))
    kind, arguments = transformers.Trainer, transformers.TrainingArguments
    return trained(kind, model, arguments, folder, changes, data)


def by_trl(model, folder, **changes):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(tiny.VOCABULARY)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0"
    )
    data = Dataset.from_list(rows())
    changes = {"max_length": 6, "gradient_checkpointing": False, **changes}
    options = {"processing_class": tokenizer}
    return trained(trl.SFTTrainer, model, trl.SFTConfig, folder, changes, data, **options)


def by_accelerate(model, folder, bf16=False):
    AcceleratorState._reset_state(True)
    precision = "bf16" if bf16 else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    data = [{"input_ids": torch.tensor(row["input_ids"])} for row in rows()]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    AcceleratorState._reset_state(True)
    return losses


CASES = [(by, {"bf16": bf16}) for by in (by_transformers, by_accelerate) for bf16 in (False, True)]
CASES += [(by_transformers, {"gradient_checkpointing": True}), (by_trl, {})]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("by", "changes"), CASES)
def test_trainers(by, changes, fused, tmp_path):
    torch.manual_seed(3)
    asked = config(target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(tiny.llama(), asked)
    patch_peft(model := copy.deepcopy(plain))
    expected, found = (by(each, tmp_path, **changes) for each in (plain, model))
    assert len(set(found)) >= STEPS  # it trains
    digits = 1e-2 if changes.get("bf16") else 1e-4 if by is by_accelerate else 1e-3
    assert found == pytest.approx(expected, rel=digits)
    passes = 4 if "gradient_checkpointing" in changes else 2
    assert len(fused) == passes * STEPS * len(layers(model))
