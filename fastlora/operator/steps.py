# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of projections of one x, from the five steps of any implementation.

An implementation is a module of five functions over lists:

    shrink(x, projections) -> (ss, scaled)    s = dropout(x) aᵀ, and what `outputs` may use instead
    outputs(x, projections, ss, scaled) -> ys
    ds_db(dys, projections, ss, need_ds, need_db) -> (dss, dbs)
    input_grad(dys, projections, dss) -> dx   Σ dy w + dropout'(ds a), written once
    da(x, projections, dss, needs) -> das

A list holds an element for each projection, None where it has no adapter or nothing is asked for.
Those with kernels take ``configs`` as well, one for each step by its name, and ``segments`` where
factors are stacked (`fastlora_kernels.steps`). The last two may be one
function, `input_grad_and_da`, which draws a mask that both need once.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def forward(
    impl: ModuleType, x: Tensor, projections: Sequence[tuple], configs=None, segments=None
) -> tuple[list[Tensor], Sequence]:
    """Return y [M, N] and s = dropout(x) aᵀ [M, R] of each projection of x [M, K]."""
    options = _options(configs, segments)
    ss, scaled = impl.shrink(x, projections, **options)
    return impl.outputs(x, projections, ss, scaled, **options), ss


def backward(
    impl, dys: Sequence, x: Tensor, projections: Sequence, ss: Sequence, need_x, needs,
    configs=None, segments=None,
) -> tuple[Tensor | None, Sequence, Sequence]:  # fmt: skip
    """Return dx [M, K] of all projections together, and da [R, K] and db [N, R] of each.

    ``needs`` says of each projection whether da and db are asked for; what is not, or has no dy,
    is None. Some dy has to be there if ``need_x``.
    """
    options = _options(configs, segments)
    need_a, need_db = zip(*needs, strict=True)
    need_ds = [True] * len(needs) if need_x else need_a
    dss, dbs = impl.ds_db(dys, projections, ss, need_ds, need_db, **options)
    if hasattr(impl, "input_grad_and_da"):
        given = dys if need_x else [None] * len(dys)
        return *impl.input_grad_and_da(given, x, projections, dss, need_a), dbs
    das = impl.da(x, projections, dss, need_a, **options) if True in need_a else [None] * len(dys)
    dx = impl.input_grad(dys, projections, dss, **options) if need_x else None
    return dx, das, dbs


def _options(configs, segments) -> dict[str, Any]:
    options = {} if configs is None else {"configs": configs}
    return options if segments is None else {**options, "segments": segments}


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep autocast from rounding float32 adapters once more inside an implementation."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def exactly(device: torch.device, function: Callable, *args: Any) -> Any:
    """Call ``function`` in `exact`, where there is anything to keep out."""
    if not torch._C._is_any_autocast_enabled():
        return function(*args)
    with exact(device):
        return function(*args)
