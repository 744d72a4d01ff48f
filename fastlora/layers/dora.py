# SPDX-License-Identifier: Apache-2.0
"""DoRA's scale: a magnitude over the norm of each row of W + scaling · B A, which nobody forms.

With c for scaling, ``‖W + c B A‖² = ‖W‖² + c · rowsum((2 W Aᵀ + c B (A Aᵀ)) ∘ B)``: one product as
narrow as the rank, in float32. Rows that nearly cancel, and its digits with them, are formed.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from fastlora.operator.blocks import shrink_rows
from fastlora.operator.steps import exactly
from fastlora.operator.weights import Quantised, dense

CANCELS = 1 / 8  # of what is summed: where less is left the row is formed
MOST_FORMED = 64  # rows, where nobody may wait to learn how many cancel
ELEMENTS = 1 << 24  # of W in float32 at a time; on a CPU fewer
# What was made for a module of PEFT's, by name, and of what; copies and pickles go without.
_made: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def scale_of(
    weight: Tensor | Quantised, a: Tensor, b: Tensor, scaling: float | Tensor, magnitude: nn.Module
) -> Tensor:
    """Return DoRA's scale [N] of a frozen weight [N, K] with lora_A [R, K] and lora_B [N, R].

    ``magnitude`` is PEFT's module of it; the norm has the dtype of a and no gradient, as in section
    4.3 of the paper (arXiv:2402.09353). It is kept in evaluation, until any of them is written to
    or replaced; what the frozen weight adds to it is kept in training as well.
    """
    with torch.no_grad():
        made = exactly(weight.device, _norm, weight, a, b, scaling, magnitude)
    return magnitude.weight / made


def _norm(weight, a: Tensor, b: Tensor, scaling, magnitude: nn.Module) -> Tensor:
    source = weight.source if type(weight) is Quantised else weight

    def frozen() -> Tensor:
        return torch.linalg.vector_norm(dense(weight), dim=1, dtype=wide)

    def whole() -> Tensor:
        own = _kept(magnitude, "frozen", (source, wide), frozen)
        return norm(weight, own, a, b, scaling).to(a.dtype)

    wide = torch.promote_types(a.dtype, torch.float32)
    if magnitude.training:
        forget(magnitude)
        return whole()
    return _kept(magnitude, "whole", (source, a, b, scaling), whole)


def norm(weight: Tensor | Quantised, own: Tensor, a: Tensor, b: Tensor, scaling) -> Tensor:
    """Return the norms [N] of the rows of ``weight + scaling · b a``, in the dtype of ``own``.

    ``own`` are those of ``weight``, and the result where b is zero, to the bit.
    """
    weight, squares, exact = dense(weight), own.square(), (a, b)
    a, b = a.to(own.dtype), b.to(own.dtype) * scaling
    gram = a @ a.t()
    total = torch.addmm(_product(weight, a), b, gram, beta=2.0).mul_(b).sum(1).add_(squares)
    # What is summed for B A alone may cancel, too: by far, before it counts.
    size = b.abs()
    summed = (size @ gram.abs()).mul_(size).sum(1)
    left = torch.add(squares, summed, alpha=1 / 8).sub_(total, alpha=1 / CANCELS)
    if weight.is_cpu and not is_compiling():
        rows = (left > 0.0).nonzero().squeeze(1)
    else:
        rows = left.topk(min(MOST_FORMED, len(left))).indices
    if len(rows):
        dtype = own.dtype if weight.device.type == "mps" else torch.float64  # it has none
        a, b = exact[0].to(dtype), exact[1][rows].to(dtype)
        formed = (weight[rows].to(dtype) + scaling * (b @ a)).square().sum(1)
        total = total.index_put((rows,), formed.to(total.dtype))
    return total.sqrt()


def _product(weight: Tensor, a: Tensor) -> Tensor:
    """Return W Aᵀ [N, R] in the dtype of a."""
    parts = weight.split(max(1, ELEMENTS // max(1, weight.shape[1])))
    return torch.cat([shrink_rows(part, a, None, 0.0) for part in parts])


def forget(magnitude: nn.Module) -> None:
    """Have the norms made again, though nothing was seen to change; those of the weight stay."""
    _made.get(magnitude, {}).pop("whole", None)


def _kept(magnitude: nn.Module, name: str, of: tuple, make: Callable[[], Tensor]) -> Tensor:
    """Return what was made of tensors and numbers, while they are the same.

    What replays a graph reads them as they are then.
    """
    if is_compiling() or (of[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    found, state = _made.setdefault(magnitude, {}), [_state(t) for t in of]
    if name not in found or found[name][0] != state:
        with torch.inference_mode(False), torch.no_grad():  # it may serve for training as well
            found[name] = state, make()
    return found[name][1]


def _state(t: Tensor | float | torch.dtype) -> Any:
    """Return what changes with a tensor's values; no storage is taken for one that is gone."""
    if not isinstance(t, Tensor):
        return t
    version = object() if t.is_inference() else t._version
    return StorageWeakRef(t.untyped_storage()), t.data_ptr(), version, t.dtype, t.device
