# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer as ``finetune`` uses it (imported by whoever trains: it needs TRL)."""

from __future__ import annotations

import inspect
import math

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from fastlora.commands.models import answer
from fastlora.commands.shared import UserError, say

IGNORED = (
    -100
)  # the label of a token that has no part in the loss, as PyTorch's cross_entropy has it


class Trainer(SFTTrainer):
    """TRL's, which measures the held-out loss by tokens.

    ``start``: what to note in the checkpoints beside the held-out loss before the first step.
    """

    def __init__(self, *arguments, ask: str | None, start: dict, **options) -> None:
        super().__init__(*arguments, **options)
        self.remove_callback(ProgressCallback)
        self.progress, self.ask, self.start = Progress(), ask, start
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
        # [B, kept, vocabulary] beside [B, kept]
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits.float()
        loss = cross_entropy(logits.mT, labels[:, keep], reduction="sum")
        # Gradients are averaged over processes.
        return loss * self.args.world_size / self.accelerator.reduce(learnt.sum(), "sum").clamp(1)

    def evaluate(self, *_, **__) -> dict:
        """Note what the model is before the first step, when Trainer asks on its start."""
        if self.state.global_step == 0:
            self.state.log_history.append(self.start | self.measure("before"))
        return {}

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
            text = answer(self.model, self.processing_class, self.ask)
            say("question", self.ask)
            say("answer", text)
        return {f"held_out_{when}": loss / count, f"answer_{when}": text}


class Progress(ProgressCallback):
    """Shows loss and speed, and ends a run that diverges."""

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:  # of all steps, at the end
            return
        check_finite(logs["loss"], f"step {state.global_step}", args.learning_rate)
        if self.training_bar is not None:
            rate = state.log_history[-1]["train_tokens_per_second"]
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")

    def close(self):
        if self.training_bar is not None:
            self.training_bar.close()


def check_finite(loss: float, where: str, lr: float) -> None:
    if not math.isfinite(loss):
        cure = f"--lr {lr:g} is too high; --restart with a lower one"
        raise UserError(f"the loss is {loss} at {where}: {cure}")
