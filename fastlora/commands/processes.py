# SPDX-License-Identifier: Apache-2.0
"""The processes of a fine-tuning run: one, or those that ``accelerate launch`` has started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fastlora.commands.finetune_data import UserError
from fastlora.commands.finetune_model import first_line, torch_device
from fastlora.model import unwrapped

T = TypeVar("T")


class Processes:
    """Where a run computes, and what its processes have to do together.

    ``count`` of them, this one being ``index`` (``first``: 0), each on its own ``device``.
    ``sharded``: each holds a part of every parameter (FSDP2) instead of all of them.
    """

    def __init__(self, device: str | None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if several and device is not None:
            raise UserError(f"--device {device}: several processes get theirs from accelerate")
        one = None if several else torch_device(device)
        # Left alone, Accelerate takes processes without a GPU for so many runs of one.
        cpu = one.type == "cpu" if one is not None else not torch.accelerator.is_available()
        try:
            # Precision and accumulation are the run's own, whatever the configuration says.
            own = {"mixed_precision": "no", "gradient_accumulation_steps": 1}
            self._accelerator = Accelerator(cpu=cpu, **own)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"accelerate cannot begin: {first_line(error)}") from error
        kind = self._accelerator.distributed_type
        known = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
        if kind not in [DistributedType[name] for name in known]:
            what = f"accelerate's {kind.value} is not supported"
            raise UserError(f"{what}; data-parallel processes and FSDP2 are")
        self.sharded = kind == DistributedType.FSDP
        if kind == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise UserError("accelerate shards on GPUs only, and there is none: leave FSDP out")
        if self.sharded and not self._accelerator.is_fsdp2:
            raise UserError("fsdp_version is 1 in accelerate's configuration; 2 is supported")
        self.count = self._accelerator.num_processes
        self.index = self._accelerator.process_index
        self.first = self.index == 0
        self.device = one or self._accelerator.device

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.device)
        how = "FSDP2" if self.sharded else "data-parallel"
        return f"{self.count} processes ({how}, {self.device.type})"

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return both on the device, ready to train together with the other processes."""
        if self.count == 1:
            model.to(self.device)
        return self._accelerator.prepare(model, optimizer, device_placement=[self.count > 1] * 2)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of what all work on together."""
        return items[self.index :: self.count]

    def total(self, *values: Tensor) -> list[Tensor]:
        """Return the sums over all processes of some numbers."""
        return list(self._accelerator.reduce(torch.stack([v.double() for v in values])))

    def step(
        self, loss: Tensor, parameters: list[nn.Parameter], optimizer: Any, most: float
    ) -> float:
        """Step by the gradient of all processes' summed losses, clipped; return its whole norm."""
        self._accelerator.backward(loss * self.count)  # gradients are averaged
        norm = self._accelerator.clip_grad_norm_(parameters, most)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def from_first(self, function: Callable[[], T]) -> T:
        """Return everywhere what ``function`` returns, or raise what it raises, in the first."""
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = function()
            except (OSError, ValueError, UserError) as error:
                found[1] = error
        if self.count > 1:
            torch.distributed.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def state(self, model: nn.Module, optimizer: Any) -> dict[str, dict]:
        """Return all of what trains and of the optimizer in the first process; all must ask."""
        own = getattr(optimizer, "optimizer", optimizer)
        parameters, states = get_state_dict(model, own, options=_options())
        return {"parameters": parameters, "optimizer": states}

    def restore(self, model: nn.Module, optimizer: Any, state: dict[str, dict]) -> None:
        """Put back what `state` returned, which the first process holds; all must ask.

        Raises ValueError, everywhere, where it is of other parameters.
        """
        held = state if self.first else {"parameters": {}, "optimizer": {}}
        trained = {n: p.shape for n, p in unwrapped(model).named_parameters() if p.requires_grad}

        def check() -> None:
            if trained != {name: p.shape for name, p in held["parameters"].items()}:
                raise ValueError("the checkpoint holds other parameters than the model trains")

        self.from_first(check)
        own = getattr(optimizer, "optimizer", optimizer)
        options = _options(broadcast_from_rank0=self.count > 1, strict=False)
        set_model_state_dict(model, held["parameters"], options=options)
        set_optimizer_state_dict(model, own, held["optimizer"], options=options)


def rank() -> int:
    """Return which of several processes this is, 0 of a single one: that speaks for all."""
    return int(os.environ.get("RANK", "0"))


def leave(code: int) -> NoReturn:
    """End this process.

    A group of gloo's, on a CPU, is left as it is: to free it can wait for ever for a thread that
    waits for Python, and Python can abort as it ends (pytorch/pytorch#179291).
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _options(**more: bool) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, **more
    )
