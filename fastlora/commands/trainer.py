# SPDX-License-Identifier: Apache-2.0
"""TRL's trainer as ``finetune`` uses it (imported by whoever trains: it needs TRL)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch.utils.data import SequentialSampler
from transformers.trainer_callback import ProgressCallback
from trl import SFTTrainer

from fastlora.commands.models import response_loss
from fastlora.commands.shared import check_finite


class Trainer(SFTTrainer):
    """Trains on its data in their order, so that a run that goes on finds its place."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss of the tokens in all processes' batches.

        On a CPU, TRL's own loss computes every token's logits, learnt or not, and twice: a step of
        SmolLM2 takes 1.7 times as long.
        """
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, count = response_loss(model, inputs)
        # Gradients are averaged over processes.
        return loss * self.args.world_size / self.accelerator.reduce(count, "sum").clamp(min=1)


class Progress(ProgressCallback):
    """Shows loss and speed, keeps the seconds with the losses, and ends a run that diverges.

    ``tokens``: how many were read after each step; ``begin`` is called before a run's first one.
    """

    def __init__(self, tokens: Sequence[int], begin: Callable[[], None]) -> None:
        super().__init__()
        self.tokens, self.begin, self.seconds = tokens, begin, 0.0
        self.loaded = False  # what a checkpoint held

    def on_train_begin(self, args, state, control, **more):
        if state.global_step == 0:
            self.begin()
        else:
            self.seconds = state.log_history[-1]["seconds"]
        super().on_train_begin(args, state, control, **more)

    def on_step_begin(self, args, state, control, **_):
        self.loaded, self.started = True, time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        self.seconds += time.perf_counter() - self.started
        super().on_step_end(args, state, control, **more)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:  # at the end, of all steps
            return
        check_finite(logs["loss"], f"step {state.global_step}", args.learning_rate)
        state.log_history[-1]["seconds"] = self.seconds
        if self.training_bar is not None:
            rate = self.tokens[state.global_step - 1] / self.seconds
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:.0f} tokens/s")
