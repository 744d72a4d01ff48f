# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer as ``finetune`` uses it (imported by whoever trains: it needs TRL)."""

import inspect
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from fastlora.commands import data, models, shared
from fastlora.commands.data import IGNORED
from fastlora.commands.shared import UserError, first_line, is_sharded, rank, say


class Trainer(SFTTrainer):
    """TRL's, which measures the held-out loss by tokens.

    ``start``: what to note in the checkpoints beside the held-out loss before the first step.
    """

    def __init__(self, *arguments, ask: str | None, start: dict, **options) -> None:
        super().__init__(*arguments, **options)
        self.progress, self.ask, self.start, self.apart = Progress(), ask, start, 0.0
        self.remove_callback(ProgressCallback)
        self.add_callback(self.progress)

    def compute_loss(self, model, inputs, *arguments, **options):
        """Return the mean loss of the tokens that are learnt in all processes' batches.

        On a CPU, TRL's own loss computes every token's logits, learnt or not, and twice: a step of
        SmolLM2 takes 1.7 times as long. Here they are made where some row has a label.
        """
        forward = type(self.model.get_base_model()).forward  # TRL hides the model's own
        keeps = "logits_to_keep" in inspect.signature(forward).parameters
        if self.args.device.type != "cpu" or not keeps:
            return super().compute_loss(model, inputs, *arguments, **options)
        labels = inputs.pop("labels")[:, 1:]
        learnt = labels != IGNORED
        keep = learnt.any(0).nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
        # [B · kept, vocabulary] beside [B · kept]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, keep].flatten(), reduction="sum")
        # Gradients are averaged over processes.
        return loss * self.args.world_size / self.accelerator.reduce(learnt.sum(), "sum").clamp(1)

    def evaluate(self, *_, **__) -> dict:
        """Note what the model is before the first step, when Trainer asks on its start."""
        if self.state.global_step == 0:
            began, bar = time.time(), self.progress.training_bar
            if bar is not None:
                bar.clear()
            self.state.log_history.append(self.start | self.measure("before"))
            if bar is not None:
                bar.unpause()
            self.apart = time.time() - began
        else:
            self.apart = -self.state.log_history[-1]["train_runtime"]
        return {}

    def log(self, logs, start_time=None) -> None:
        """Log, the time with that before a run went on, and without that of `evaluate`."""
        super().log(logs, start_time and start_time + self.apart)

    @torch.no_grad()
    def measure(self, when: str) -> dict:
        """Return and say the held-out loss and the answer, ``when`` training."""
        loss, count, text = 0.0, 0, None
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        for batch in DataLoader(self.eval_dataset, size, collate_fn=self.data_collator):
            learnt = (batch["labels"][:, 1:] != IGNORED).sum().item()
            loss += self.compute_loss(self.model, self._prepare_inputs(batch)).item() * learnt
            count += learnt
        check_finite(loss, f"the end, {when} training", self.args.learning_rate)
        say(when, f"held-out loss {loss / count:.3f}")
        if self.ask is not None:
            text = models.answer(self.model, self.processing_class, self.ask)
            say("question", self.ask)
            say("answer", text)
        return {f"held_out_{when}": loss / count, f"answer_{when}": text}


class Progress(ProgressCallback):
    """Shows loss and speed, ends a run that diverges, and knows whether a step has ``begun``."""

    begun = False

    def on_step_begin(self, args, state, control, **_):
        self.begun = True

    def on_step_end(self, args, state, control, **more):
        super().on_step_end(args, state, control, **more)
        # Trainer would make one step too many, going on from the last.
        control.should_save &= state.global_step < state.max_steps

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:  # of all steps, at the end
            return
        check_finite(logs["loss"], f"step {state.global_step}", args.learning_rate)
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed(logs)}")

    def close(self):
        if self.training_bar is not None:
            self.training_bar.close()


def speed(row: dict[str, Any]) -> str:
    return f"{row['num_input_tokens_seen'] / row['train_runtime']:.0f} tokens/s"


def check_finite(loss: float, where: str, lr: float) -> None:
    if not math.isfinite(loss):
        cure = f"--lr {lr:g} is too high; --restart with a lower one"
        raise UserError(f"the loss is {loss} at {where}: {cure}")


def train(
    s: Namespace, config: Any, examples: list, own: dict, checkpoint: str | None, step: int
) -> dict[str, Any]:
    """Train, from ``checkpoint`` on, and save the adapter; return what metrics.json is to hold."""
    import fastlora

    how, count = "FSDP2" if is_sharded() else "data-parallel", config.world_size
    where = config.device.type + f", {count} processes ({how})" * (count > 1)
    bits = 4 if s.load_in_4bit else 8 if s.load_in_8bit else None
    kept = f"{bits} bits, {s.dtype}" if bits else s.dtype
    say("model", f"{s.model}, {kept} on {where}; loading may take half a minute")
    model, tokenizer = models.load_model(s.model, shared.DTYPES[s.dtype], bits)
    torch.manual_seed(s.seed)
    lora = {"r": s.r, "lora_alpha": s.alpha, "lora_dropout": s.dropout}
    model = models.adapted(model, s.target_modules, task_type="CAUSAL_LM", **lora)
    say("adapter", first_line(fastlora.patch_peft(model)))
    trainer = _trainer(s, config, model, tokenizer, examples, own)
    set_seed(s.seed + rank())  # each process drops others
    if checkpoint is not None:
        say("resumed", f"after step {step} of {s.steps}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:  # whatever reading a damaged file may raise
        if checkpoint is None or trainer.progress.begun:
            raise
        text = f"cannot go on from {checkpoint}: {type(error).__name__}: {first_line(error)}"
        raise UserError(f"{text}; --restart begins again") from error
    finally:
        trainer.progress.close()
    before, *steps, _ = trainer.state.log_history  # the last row is of all steps
    seconds = steps[-1]["train_runtime"]
    say("speed", f"{speed(steps[-1])}, {seconds / 60:.1f} minutes of training")
    versions = {"fastlora": fastlora.__version__, "torch": torch.__version__}
    metrics = {**before, **trainer.measure("after"), "versions": versions, "seconds": seconds}
    metrics["trainable"], _ = trainer.model.get_nb_trainable_parameters()
    metrics["tokens"] = steps[-1]["num_input_tokens_seen"]
    metrics["losses"] = [row["loss"] for row in steps]
    metrics["gradient_norms"] = [row["grad_norm"] for row in steps]
    folder = Path(s.output, "adapter")
    say("saved", f"{folder} (PEFT format){_save_and_check(trainer, folder)}")
    return metrics


def _trainer(s: Namespace, config: Any, model, tokenizer, examples: list, own: dict) -> Any:
    """Return the trainer of the examples, which TRL cuts, without those that have nothing left."""
    datasets.disable_progress_bars()
    try:
        training, held_out = (
            datasets.Dataset.from_list([data.encode(tokenizer, example) for example in side])
            for side in data.split(examples, s.held_out, s.seed)
        )
    except TemplateError as error:
        raise UserError(f"the model's chat template: {first_line(error)}") from error
    rows = {"train_dataset": training, "eval_dataset": held_out, "processing_class": tokenizer}
    trainer = Trainer(model, config, **rows, ask=s.ask, start={"settings": own})
    for p in model.parameters():  # TRL rounds them to bfloat16 on a quantised model
        if p.requires_grad:
            p.data = p.data.float()
    counts = [len(trainer.train_dataset), len(trainer.eval_dataset)]
    if not all(counts):
        raise UserError(f"--seq-len {s.seq_len} leaves no token of any response; raise it")
    # Several processes then learn what one does, as every step has all its examples.
    trainer.args.dataloader_drop_last = counts[0] >= s.batch_size
    left_out = len(examples) - sum(counts)
    note = f"; {left_out} left out (prompt longer than --seq-len)" if left_out else ""
    say("data", f"{counts[0]} examples to train on, {counts[1]} held out{note}")
    return trainer


@torch.no_grad()
def _save_and_check(trainer: Any, folder: Path) -> str:
    """Save the adapter, load it beside the trained one; return how the outputs compare."""
    import fastlora

    model, batch = trainer.model, trainer.data_collator([trainer.eval_dataset[0]])
    if is_sharded() or rank() == 0:
        fastlora.save_adapter(model, folder)
    if is_sharded() or rank():
        return ", from all processes' shards"
    known = trainer._prepare_inputs({name: batch[name] for name in ("input_ids", "attention_mask")})
    trained = model(**known).logits
    model.load_adapter(str(folder), "saved", torch_device=str(model.device))
    model.set_adapter("saved")
    difference = (trained - model(**known).logits).abs().max().item()
    return f"; loaded again, its outputs differ by at most {difference:.2g}"
