# SPDX-License-Identifier: Apache-2.0
"""Adapters mixed in one batch: `adapters_by_sample`, for training as for inference."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.layers.classes import unwrapped
from fastlora.layers.mixed import Block

CHECKPOINT = "_gradient_checkpointing_func"  # what transformers has its layers call


@contextlib.contextmanager
def adapters_by_sample(
    model: nn.Module, names: Sequence[str | None], *, lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Have each sample of a batch meet an adapter of its own, in training and in inference.

    ``model`` is one that `patch_peft` has patched. ``names`` holds an adapter's name for each
    sample, the first dimension of what its layers get, or None for the base alone; with ``lengths``
    for each run of so many tokens, in a batch that is packed or has no such dimension. Samples of
    one adapter next to each other are cheaper than scattered ones. The frozen weights are read once
    for all of them; dropout, autocast, siblings and gated MLPs are as outside of the block, and
    under ``torch.compile`` the layers run in eager mode. Which adapters train is PEFT's:
    ``model.set_requires_grad(["a", "b"])``.

    Checkpoints of transformers' models find the block again in backward, wherever that is; where
    others compute again, backward has to be inside of the block as well.
    Raises ValueError or TypeError for names that no adapter has, for lengths that do not go with
    them, and for models whose adapters can't be mixed: not patched, merged, or with parts beside
    fused layers, such as DoRA or ``modules_to_save``. Layers raise where what they get is of
    another number of samples.
    """
    model = unwrapped(model)
    layers, block = _checked(model, names, lengths), Block(tuple(names), lengths)
    checkpoints = {m: vars(m)[CHECKPOINT] for m in model.modules() if CHECKPOINT in vars(m)}
    try:
        for layer in layers:
            layer._by_sample = block
        for module, checkpoint in checkpoints.items():
            own = [m for m in module.modules() if getattr(m, "_by_sample", None) is block]
            vars(module)[CHECKPOINT] = functools.partial(_checkpointed, block, own, checkpoint)
        yield
    finally:
        block.ended = True
        for module, checkpoint in checkpoints.items():
            vars(module)[CHECKPOINT] = checkpoint
        for layer in layers:  # it stays where a checkpoint may ask for it, until the next forward
            layer._by_sample = block if block.checkpointed else None


def _checkpointed(block: Block, layers: list[nn.Module], checkpoint: Callable, *given: Any) -> Any:
    """Call ``checkpoint`` with a function that runs within the block, now and in backward."""
    function, *args = given

    def run(*args: Any) -> Any:
        with block.within(layers):
            return function(*args)

    return checkpoint(run, *args)


def _checked(model: nn.Module, names: Sequence, lengths: Sequence[int] | None) -> list[nn.Module]:
    """Return the fused layers, or raise as `adapters_by_sample` does."""
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    from fastlora.peft.linear import Fused, operands

    if isinstance(names, str) or not all(n is None or isinstance(n, str) for n in names):
        raise TypeError(f"names must hold a str or None for each sample, got {names!r:.100}")
    if not len(names):
        raise ValueError("names must hold one for each sample, got none")
    if lengths is not None and (len(lengths) != len(names) or min(lengths) < 0):
        of = f"a number of tokens for each of {len(names)} names"
        raise ValueError(f"lengths must hold {of}, got {lengths!r:.100}")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
    fused = [layer for layer in layers.values() if isinstance(layer, Fused)]
    if not fused:
        raise ValueError(f"{type(model).__name__} has no fused layer: patch_peft() comes first")
    if any(layer._by_sample is not None and not layer._by_sample.ended for layer in fused):
        raise ValueError("adapters_by_sample() is inside of another block of the same model")
    wanted = {name for name in names if name is not None}
    known = {name for layer in layers.values() for name in _adapters(layer)}
    if wanted - known:
        raise ValueError(
            f"names must be of adapters ({', '.join(sorted(known))}), got {sorted(wanted - known)}"
        )
    for path, layer in layers.items():
        own = sorted(wanted & _adapters(layer))
        why = f"is a {type(layer).__name__}, not fused"
        if layer.merged_adapters:
            why = "has merged adapters: unmerge_adapter() first"
        elif isinstance(layer, Fused):
            found = operands(layer, runs=[(name, slice(0, 0)) for name in own])
            why = found if isinstance(found, str) else None
        elif isinstance(layer, ParamWrapper):
            why = f"adapts {layer.parameter_name} of experts, whose rows are no samples"
        if why is not None and (own or layer.merged_adapters):
            raise ValueError(f"adapters cannot be mixed in this model: {path} {why}")
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and wanted & set(module._adapters):
            raise ValueError(
                f"adapters cannot be mixed in this model: {path} is trained in full "
                "(modules_to_save), or its tokens are, for one adapter at a time"
            )
    return fused


def _adapters(layer: nn.Module) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def losses_by_adapter(
    logits: Tensor, labels: Tensor, names: Sequence[str | None], ignore_index: int = -100
) -> dict[str | None, Tensor]:
    """Return by adapter the mean cross-entropy of its own tokens, as if it had trained alone.

    ``logits`` [B, T, V] of a causal model, ``labels`` [B, T] as transformers takes them: those of
    the same positions, which are shifted here, ``ignore_index`` where there is none. ``names``: an
    adapter's for each of the B samples, else ValueError. The sum of the values trains all of them.
    """
    if not len(names) == len(labels) == len(logits):
        sizes = f"{len(names)} names, {len(labels)} rows of labels and {len(logits)} of logits"
        raise ValueError(f"names, labels and logits must be of as many samples, got {sizes}")
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=ignore_index,
        reduction="none",
    ).view(len(labels), -1)
    counts, found = (labels[:, 1:] != ignore_index).sum(1), {}
    for name in dict.fromkeys(names):
        of = [i for i, other in enumerate(names) if other == name]
        found[name] = losses[of].sum() / counts[of].sum()
    return found
