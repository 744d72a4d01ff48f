"""The ``torch.library`` operators behind `lora_linear`: schema, fake, autograd, bodies.

``fastlora::lora_linear`` returns y and what backward needs of the low-rank path (s);
``fastlora::lora_linear_backward`` returns the gradients of x and of the adapters. Both take
2-D tensors and the name of an implementation; "auto" is resolved inside, for the sizes that come,
so that one compiled graph serves them all. The gradients of a trained base weight and bias are
plain products and are written in the autograd formula.

`run` calls the bodies without the dispatcher where nothing could tell: in eager mode the way
through it and back costs as much Python time as ten small products.
"""

from __future__ import annotations

import contextlib

import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear

from fastlora import plans
from fastlora.dropout import keep_mask, kept_scale

_lib = torch.library.Library("fastlora", "DEF")
_lib.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor? seed, Scalar scaling, float dropout_p, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
    "Tensor s, Tensor? seed, Scalar scaling, float dropout_p, str impl, "
    "bool need_x, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep autocast from rounding float32 adapters once more inside an implementation."""
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":
        return _NOTHING
    return torch.autocast(device.type, enabled=False)


_NOTHING = contextlib.nullcontext()


@torch.library.impl(_lib, "lora_linear", "CompositeExplicitAutograd")
def _forward(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl):
    body = plans.function("forward", impl, x, weight, lora_A, seed is not None)
    with exact(x.device):
        return body(x, weight, lora_A, lora_B, bias, seed, float(scaling), dropout_p)


@torch.library.impl(_lib, "lora_linear_backward", "CompositeExplicitAutograd")
def _backward(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    body = plans.function("backward", impl, x, weight, lora_A, seed is not None, dy)
    rest = (s, seed, float(scaling), dropout_p, (need_x, need_A, need_B))
    with exact(x.device):
        grads = body(dy, x, weight, lora_A, lora_B, *rest)
    # An operator returns tensors: an empty one stands for a gradient nobody asked for.
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fastlora::lora_linear", lib=_lib)
def _forward_fake(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], lora_A.shape[0], dtype=lora_A.dtype)


@torch.library.register_fake("fastlora::lora_linear_backward", lib=_lib)
def _backward_fake(
    dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, need_x, need_A, need_B
):
    return (
        x.new_empty(x.shape) if need_x else dy.new_empty(0),
        lora_A.new_empty(lora_A.shape) if need_A else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_B else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    _save(ctx, *inputs[:4], output[1], inputs[5:])


def _save(ctx, x, weight, lora_A, lora_B, s, rest):
    ctx.rest = rest[1:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_A, lora_B, rest[0], s)


def _autograd(ctx, dy, _):
    return (*_grads(ctx, dy), None, None, None, None)


def _grads(ctx, dy):
    """Return the gradients of x, weight, lora_A, lora_B and bias, each None where none is asked."""
    if dy is None:
        return (None,) * 5
    x, weight, lora_A, lora_B, seed, s = ctx.saved_tensors
    scaling, dropout_p, impl = ctx.rest
    need_x, need_weight, need_A, need_B, need_bias = ctx.needs_input_grad[:5]
    dx = da = db = None
    if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
        dx, da, db = _differentiable_grads(dy, x, weight, lora_A, lora_B, seed, scaling, dropout_p)
    elif need_x or need_A or need_B:
        needs = (need_x, need_A, need_B)
        direct = _unobserved(x, weight, lora_A, lora_B, dy)
        body = _backward if direct else torch.ops.fastlora.lora_linear_backward
        grads = body(dy, x, weight, lora_A, lora_B, s, seed, scaling, dropout_p, impl, *needs)
        dx, da, db = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    dw = dy.t() @ x if need_weight else None
    dbias = dy.sum(0) if need_bias else None
    return dx, dw, da, db, dbias


def _differentiable_grads(dy, x, weight, lora_A, lora_B, seed, scaling, dropout_p):
    keep = None
    if seed is not None:
        keep = keep_mask(seed, range(x.shape[0]), x.shape[1], dropout_p)
        keep = keep.to(lora_A.dtype) * kept_scale(dropout_p)
    x_hat = x.to(lora_A.dtype) if keep is None else x.to(lora_A.dtype) * keep
    dy_scaled = dy.to(lora_B.dtype) * scaling
    ds = dy_scaled @ lora_B
    low_rank = ds @ lora_A if keep is None else (ds @ lora_A) * keep
    dx = dy @ weight + low_rank.to(x.dtype)
    return dx, ds.t() @ x_hat, dy_scaled.t() @ (x_hat @ lora_A.t())


torch.library.register_autograd(
    "fastlora::lora_linear", _autograd, setup_context=_setup_context, lib=_lib
)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, rest):
        y, s = _forward(x, weight, lora_A, lora_B, bias, *rest)
        _save(ctx, x, weight, lora_A, lora_B, s, rest)
        return y

    @staticmethod
    def backward(ctx, dy):
        return (*_grads(ctx, dy), None)


# Without Function.apply's preparations for functorch, which take 7 µs: `_unobserved` excludes its
# tensors, also those that outlived their transform.
_apply = super(torch.autograd.Function, _Direct).apply


def run(x, weight, lora_A, lora_B, bias, *rest) -> torch.Tensor:
    """Return y of ``fastlora::lora_linear``, by the shortest way that gives what the operator does.

    ``rest``: seed, scaling, dropout_p, impl.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _transformed(x, weight, lora_A, lora_B, bias, *rest)
    if not _unobserved(x, weight, lora_A, lora_B, bias):
        return torch.ops.fastlora.lora_linear(x, weight, lora_A, lora_B, bias, *rest)[0]
    if torch.is_grad_enabled() and (
        lora_A.requires_grad
        or lora_B.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, lora_A, lora_B, bias, rest)
    return _forward(x, weight, lora_A, lora_B, bias, *rest)[0]


def _transformed(x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p, impl) -> torch.Tensor:
    """Return y in plain torch, which `torch.func` and forward-mode AD can go through."""
    with exact(x.device):
        x_hat = x.to(lora_A.dtype)
        if seed is not None:
            keep = keep_mask(seed, range(x.shape[0]), x.shape[1], dropout_p)
            x_hat = x_hat * keep.to(lora_A.dtype) * kept_scale(dropout_p)
        low_rank = linear(linear(x_hat, lora_A), lora_B) * scaling
        return (linear(x, weight, bias) + low_rank).to(x.dtype)


def _unobserved(x, weight, lora_A, lora_B, other) -> bool:
    """Return whether no compiler, dispatch mode, transform or subclass would see an operator."""
    return (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(lora_A) in _PLAIN
        and type(lora_B) in _PLAIN
        and type(other) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not (_wrapped(x) or _wrapped(weight) or _wrapped(lora_A) or _wrapped(lora_B))
        and (other is None or not _wrapped(other))
    )


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
