# SPDX-License-Identifier: Apache-2.0
"""PEFT models, trained by what people train them with: patched, they have the same losses."""

import copy

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
MODELS = {
    "Llama": tiny.llama,
    "Llama in bfloat16": lambda: tiny.llama().to(torch.bfloat16),
    "Qwen2": lambda: tiny.decoder("Qwen2"),
    "Qwen3": lambda: tiny.decoder("Qwen3", head_dim=4),
    "Gemma": lambda: tiny.decoder("Gemma", head_dim=4),
    "Gemma3": lambda: tiny.decoder("Gemma3", head_dim=4),
    "Phi": lambda: tiny.decoder("Phi"),
    "Phi3": lambda: tiny.decoder("Phi3", eos_token_id=1),
    "Mistral": lambda: tiny.decoder("Mistral"),
    "GPT-2": tiny.gpt2,
    "BERT": tiny.bert,
    "T5": tiny.t5,
    "ViT": tiny.vit,
    "diffusion": tiny.diffusion_transformer,
}


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


def train(model, name="Llama"):
    """Return the losses of some steps."""
    to = getattr(torch, name.rpartition("to ")[2], torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=to == torch.float16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", to, enabled="autocast" in name):
            loss = loss_of(model, name)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize(
    "name", [*MODELS, "Llama, autocast to bfloat16", "GPT-2, autocast to float16"]
)
def test_models(name, fused):
    targets = ATTENTION if name == "diffusion" else "all-linear"
    plain, model, report = pair(MODELS[name.partition(",")[0]](), target_modules=targets)
    assert report.not_fused == []
    digits = 1e-2 if "autocast" in name else 2e-2 if "bfloat16" in name else 1e-4
    assert train(model, name) == pytest.approx(train(plain, name), rel=digits)
    assert len(fused) == STEPS * len(layers(model)) > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_with_dropout(reentrant, fused):
    """The same elements are dropped when the forward is run again."""
    _, model, _ = pair(tiny.llama(), target_modules="all-linear", lora_dropout=0.3)
    checkpointed = copy.deepcopy(model.train())
    checkpointed.enable_input_require_grads()
    kwargs = {"use_reentrant": reentrant}
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    losses = []
    for each in (model, checkpointed):
        torch.manual_seed(5)
        losses.append(train(each))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(fused) == 3 * STEPS * len(layers(model))
    for own, other in zip(model.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


# Trainers: each returns the losses of STEPS steps of two batches


def rows(**columns):
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, tiny.VOCABULARY, (4 * STEPS, 6), generator=generator).tolist()
    return [
        {"input_ids": row, **{name: make(row) for name, make in columns.items()}} for row in ids
    ]


def trained(kind, model, arguments, folder, changes, data, **options):
    asked = arguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"bf16": False, "save_strategy": "no", **changes},
    )
    trainer = kind(model, asked, train_dataset=data, **options)
    trainer.train(asked.resume_from_checkpoint)
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("by", "changes"),
    [
        (by_transformers, {}),
        (by_transformers, {"gradient_checkpointing": True}),
        (by_transformers, {"bf16": True}),
        (by_trl, {}),
        (by_accelerate, {}),
        (by_accelerate, {"bf16": True}),
    ],
)
def test_trainers(by, changes, fused, tmp_path):
    torch.manual_seed(3)
    asked = config(target_modules="all-linear", init_lora_weights=False)
    plain = get_peft_model(tiny.llama(), asked)
    patch_peft(model := copy.deepcopy(plain))
    expected, found = (by(each, tmp_path, **changes) for each in (plain, model))
    assert len(set(found)) >= STEPS  # it trains
    digits = 1e-2 if "bf16" in changes else 1e-4 if by is by_accelerate else 1e-3
    assert found == pytest.approx(expected, rel=digits)
    passes = 4 if "gradient_checkpointing" in changes else 2
    assert len(fused) == passes * STEPS * len(layers(model))


def test_a_trainer_that_resumes(fused, tmp_path):
    """On a new model, from a checkpoint half way: as if it had never stopped."""
    torch.manual_seed(3)
    asked = config(target_modules="all-linear", init_lora_weights=False)
    patch_peft(model := get_peft_model(tiny.llama(), asked))
    again, saving = copy.deepcopy(model), {"save_strategy": "steps", "save_steps": 2}
    losses = by_transformers(model, tmp_path, **saving)
    fused.clear()
    half = str(tmp_path / "checkpoint-2")
    assert by_transformers(again, tmp_path, resume_from_checkpoint=half, **saving) == losses
    assert len(fused) == 2 * 2 * len(layers(model))
    assert all(map(torch.equal, again.parameters(), model.parameters()))
