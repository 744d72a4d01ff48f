# SPDX-License-Identifier: Apache-2.0
"""PEFT models, trained by what people train them with: patched, they have the same losses."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import layers
from tiny_models import (
    VOCABULARY,
    bert,
    decoder,
    diffusion_transformer,
    gpt2,
    llama,
    t5,
    tokens,
    vit,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fastlora import patch_peft

STEPS = 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MODELS = {
    "Llama": llama,
    "Llama in bfloat16": lambda: llama().to(torch.bfloat16),
    "Qwen2": lambda: decoder("Qwen2"),
    "Qwen3": lambda: decoder("Qwen3", head_dim=4),
    "Gemma": lambda: decoder("Gemma", head_dim=4),
    "Gemma3": lambda: decoder("Gemma3", head_dim=4),
    "Phi": lambda: decoder("Phi"),
    "Phi3": lambda: decoder("Phi3", eos_token_id=1),
    "Mistral": lambda: decoder("Mistral"),
    "GPT-2": gpt2,
    "BERT": bert,
    "T5": t5,
    "ViT": vit,
    "diffusion": diffusion_transformer,
}


def wrapped(model, **changes):
    torch.manual_seed(3)
    asked = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**asked))


def twice(model):
    """Return the model, and a copy that is patched."""
    patched = copy.deepcopy(model)
    assert patch_peft(patched).not_fused == []
    return model, patched


def loss_of(model, name="Llama"):
    if name == "diffusion":
        given = {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
        noise = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        return (model(noise, **given).sample ** 2).mean()
    if name == "ViT":
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
        return model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss
    labels = torch.tensor([0, 2]) if name == "BERT" else tokens()
    return model(input_ids=tokens(), labels=labels).loss


def train(model, name="Llama", **with_):
    """Return the losses of some steps."""
    autocast = with_.get("autocast", torch.autocast("cpu", enabled=False))
    scaler = with_.get("scaler", torch.amp.GradScaler("cpu", enabled=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(STEPS):
        with autocast:
            loss = loss_of(model, name)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("name", MODELS)
def test_models(name, fused):
    targets = ATTENTION if name == "diffusion" else "all-linear"
    plain, model = twice(wrapped(MODELS[name](), target_modules=targets))
    digits = 2e-2 if "bfloat16" in name else 1e-4
    assert train(model, name) == pytest.approx(train(plain, name), rel=digits)
    assert len(fused) == STEPS * len(layers(model)) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler_of_gradients(dtype, fused):
    plain, model = twice(wrapped(llama()))
    losses = [
        train(
            each,
            autocast=torch.autocast("cpu", dtype),
            scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16),
        )
        for each in (plain, model)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert len(fused) == STEPS * len(layers(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_with_dropout(reentrant, fused):
    """The same elements are dropped when the forward is run again."""
    model = wrapped(llama(), lora_dropout=0.3)
    patch_peft(model)
    model.train()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_input_require_grads()
    kwargs = {"use_reentrant": reentrant}
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    losses = []
    for each in (model, checkpointed):
        fused.clear()
        torch.manual_seed(5)
        losses.append(train(each))
        calls = len(fused)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert calls == 2 * STEPS * len(layers(model))
    for own, other in zip(model.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_compiled():
    """In one graph, for any number of tokens, with dropout and without."""
    plain, model = twice(wrapped(llama(num_hidden_layers=1), lora_dropout=0.3).eval())
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    expected = plain(tokens()).logits
    try:
        found = compiled(tokens()).logits
    except torch._dynamo.exc.Unsupported as error:
        with pytest.raises(torch._dynamo.exc.Unsupported):  # or the fault is ours
            torch.compile(plain, backend="aot_eager", fullgraph=True)(tokens())
        pytest.skip(f"this PyTorch compiles no such model of this transformers: {error}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    compiled.train()
    counts = []
    for length in (7, 8, 13):
        ids = torch.randint(0, VOCABULARY, (2, length))
        compiled(ids, labels=ids).loss.backward()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, f"graphs made for other numbers of tokens: {counts}"


# Trainers


def arguments(folder, kind=transformers.TrainingArguments, **changes):
    own = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return kind(**{**own, **changes})


def rows(count=16):
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, VOCABULARY, (count, 6), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * 6} for row in ids]


def logged(trainer):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == STEPS  # it trains
    return losses


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_transformers_trainer(tmp_path, changes, fused):
    losses = []
    for each in twice(wrapped(llama())):
        trainer = transformers.Trainer(each, arguments(tmp_path, **changes), train_dataset=rows())
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if "bf16" in changes else 1e-3)
    passes = 2 if changes.get("gradient_checkpointing") else 1
    assert len(fused) == 2 * passes * STEPS * len(layers(each))


def test_a_trainer_that_resumes(tmp_path, fused):
    """Stopped after two steps and started again on a new model: as if it had never stopped."""
    _, model = twice(wrapped(llama()))
    start = copy.deepcopy(model)
    whole = transformers.Trainer(model, arguments(tmp_path / "whole"), train_dataset=rows())
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    asked = arguments(tmp_path / "halves", **saving)
    first = transformers.Trainer(copy.deepcopy(start), asked, train_dataset=rows())

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    first.add_callback(Stop)
    first.train()
    second = transformers.Trainer(start, asked, train_dataset=rows())
    fused.clear()
    second.train(resume_from_checkpoint=True)
    assert logged(second) == logged(whole)
    assert len(fused) == 2 * 2 * len(layers(model))
    for own, other in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(own, other)
    folder = tmp_path / "halves" / f"checkpoint-{STEPS}"
    saved = PeftModel.from_pretrained(llama(), folder).eval()
    with torch.no_grad():
        expected, found = model.eval()(tokens()).logits, saved(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(tmp_path, fused):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0"
    )
    losses = []
    for each in twice(wrapped(llama())):
        asked = arguments(tmp_path, trl.SFTConfig, max_length=6, gradient_checkpointing=False)
        own = [{"input_ids": row["input_ids"]} for row in rows()]
        trainer = trl.SFTTrainer(
            each, asked, train_dataset=Dataset.from_list(own), processing_class=tokenizer
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(fused) >= 2 * STEPS * len(layers(each))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, fused):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    losses = []
    for each in twice(wrapped(llama())):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], 1e-2)
        data = [{"input_ids": torch.tensor(row["input_ids"])} for row in rows()]
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        model, optimizer, loader = accelerator.prepare(each, optimizer, loader)
        losses.append([])
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, labels=batch["input_ids"]).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1].append(loss.item())
    AcceleratorState._reset_state(True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if precision == "bf16" else 1e-4)
    assert len(fused) == 8 * len(layers(each))
