# SPDX-License-Identifier: Apache-2.0
"""`lora_linear`: checks its arguments, then calls the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.operator import plans
from fastlora.operator.dropout import new_seed
from fastlora.operator.op import PLAIN, run, wrapped
from fastlora.operator.operands import Operands, Projection, with_scaling
from fastlora.operator.steps import exact

# What autocast casts; it leaves float64, integers and complex numbers alone.
_CAST = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*_CAST, torch.float64)
_unsafe_view = torch.ops.aten._unsafe_view.default
LARGEST = torch.finfo(torch.float32).max  # what kernels take as a scaling


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return ``x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`` (LoRA, Hu et al., arXiv:2106.09685).

    Shapes: ``x`` [..., K], ``weight`` [N, K], ``lora_A`` [R, K], ``lora_B`` [N, R], ``bias``
    [N]; returns [..., N] in the dtype of ``x``. Any strides; any rank R ≥ 1; nothing is modified.
    Dtypes: ``x``, ``weight`` and ``bias`` all float32, bfloat16, float16 or (implementations
    "blocks", "eager" and "reference") float64; ``lora_A`` and ``lora_B`` the same, or both float32
    under a bfloat16 or float16 base. Under autocast x, weight and bias are cast to its dtype.

    ``scaling`` is alpha / r; as a 0-d tensor on x's device or the CPU it may change without a
    recompilation of a compiled model. Dropout with probability ``dropout_p`` acts on the input of
    the low-rank path when ``training``; its seed comes from torch's generator for ``x.device``.
    ``impl`` is "auto" (choose), "triton", "library" (the vendor's wide products, Triton kernels
    for the narrow ones), "blocks", "eager" (PyTorch's own operations and gradients, which keep more
    for backward) or "reference"; a named one never falls back.

    Differentiable in x, lora_A and lora_B, and in weight and bias where they require grad.
    Raises TypeError or ValueError naming the argument that is wrong, and RuntimeError when the
    named implementation cannot run here.
    """
    if lora_A is None:  # a projection may have no adapter, this function is about one
        raise TypeError("lora_A must be a Tensor, got NoneType")
    plain = _plain(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if not plain:
        x, given = _checked(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
        weight, lora_A, lora_B, bias, scaling, dropout_p = given
    seed = new_seed(x.device) if training and dropout_p else None
    one = [Operands(weight, lora_A, lora_B, bias, seed, scaling, dropout_p)]
    return _outputs(x, one, impl, plain)[0]


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    training: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    """Return what `lora_linear` does for each of several projections of one x, such as q, k and v.

    They may differ in all but K: width, rank, bias, scaling, dropout, and in whether they have an
    adapter at all. x is read once for all of them where that is faster, and its gradient is added
    up as it is made. Each drops its own elements of x.

    Shapes: ``x`` [..., K]; a list of [..., N], one for each projection, each a tensor of its own.
    Dtypes, ``training``, ``impl`` and errors as for `lora_linear`; an error says which projection
    is wrong.
    """
    if not len(projections):
        raise ValueError("projections must hold at least one, got none")
    if all([_plain(x, *projection) for projection in projections]):  # noqa: C419, faster
        return list(_outputs(x, _seeded(x, projections, training), impl, plain=True))
    x, projections = checked(x, projections)
    return list(run_checked(x, projections, training, impl))


def checked(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, list[Projection]]:
    """Return x and projections as `run_checked` takes them, or raise as `lora_linears` does."""
    found = []
    for i, projection in enumerate(projections):
        if not _plain(x, *projection):
            try:
                x, projection = _checked(x, *projection)
            except (TypeError, ValueError) as error:
                raise type(error)(f"projections[{i}]: {error}") from None
        found.append(projection)
    return x, found


def run_checked(
    x: Tensor, projections: Sequence[Projection], training: bool, impl: str = "auto"
) -> Sequence[Tensor]:
    """Do what `lora_linears` does once everything is checked."""
    return _outputs(x, _seeded(x, projections, training), impl)


def _outputs(
    x: Tensor, operands: list[Operands], impl: str, plain: bool = False
) -> Sequence[Tensor]:
    """Return y [..., N] of each projection of x [..., K]; ``plain`` as `run` has it."""
    if impl != "auto" or plans.FORCED != "auto":
        impl = plans.named(impl, x)
    shape = x.shape
    if len(shape) != 2:
        return [shaped(y, shape) for y in _outputs(_flat(x), operands, impl, plain)]
    if impl != "reference":
        return run(x, operands, impl, plain)
    from fastlora.operator import reference

    with exact(x.device):
        return [reference.output(x, *one) for one in operands]


def shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """Return y [M, N] as [..., N] for x of ``shape`` [..., K]; as little a view as y itself.

    What is written into an output, or detaches it, must be able to after `torch.no_grad` as well.
    """
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))


def drawn(
    x: Tensor, projections: Sequence[Projection], training: bool
) -> tuple[Tensor, list[Operands]]:
    """Return x as [M, K] and each projection with a seed where it drops."""
    return _flat(x), _seeded(x, projections, training)


def _seeded(x: Tensor, projections: Sequence[Projection], training: bool) -> list[Operands]:
    return [
        Operands(
            w, a, b, bias, new_seed(x.device) if training and p and a is not None else None, c, p
        )
        for w, a, b, bias, c, p in projections
    ]


def _flat(x: Tensor) -> Tensor:
    shape = x.shape
    return x if len(shape) == 2 else x.reshape(math.prod(shape[:-1]), shape[-1])


def _plain(x, weight, lora_A, lora_B, bias, scaling, dropout_p) -> bool:
    """Return whether the arguments are as in most calls: nothing to cast and nothing wrong.

    Nor is there a subclass, or what `op.unobserved` would see otherwise. It takes a third of the
    time of `_check`, which can say what is wrong.
    """
    if not (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and type(scaling) is type(dropout_p) is float
        and -LARGEST <= scaling <= LARGEST
        and 0.0 <= dropout_p <= 1.0
    ):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if not (
        shape
        and dtype in DTYPES
        and not (x.is_meta or torch._C._is_any_autocast_enabled())
        and _bare(x, dtype, device)
        and _bare(weight, dtype, device)
    ):
        return False
    w = weight.shape
    if len(w) != 2 or shape[-1] != w[1]:
        return False
    if lora_A is not lora_B:  # both None, or one tensor twice, which is rare
        adapter = lora_A.dtype if type(lora_A) in PLAIN else dtype
        if not (
            (adapter == dtype or (adapter == torch.float32 and dtype.itemsize == 2))
            and _bare(lora_A, adapter, device)
            and _bare(lora_B, adapter, device)
            and len(a := lora_A.shape) == 2
            and a[1] == w[1]
            and a[0] >= 1
            and lora_B.shape == (w[0], a[0])
        ):
            return False
    elif lora_A is not None:
        return False
    return bias is None or (_bare(bias, dtype, device) and bias.shape == w[:1])


def _bare(t, dtype: torch.dtype, device: torch.device) -> bool:
    return (
        type(t) in PLAIN
        and t.dtype == dtype
        and t.device == device
        and t.layout is torch.strided
        and not (t.is_neg() or wrapped(t))
    )


def _checked(x, weight, lora_A, lora_B, bias, scaling, dropout_p) -> tuple[Tensor, Projection]:
    """Return x and a projection of it as the operator takes them, or raise."""
    _check_types(x, weight, lora_A, lora_B, bias)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, weight, lora_A, lora_B, bias = _autocast(x, weight, lora_A, lora_B, bias)
    _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if isinstance(scaling, Tensor):
        if lora_B is not None:
            lora_A, lora_B = with_scaling(lora_A, lora_B, scaling)
        scaling = 1.0
    return x, Projection(weight, lora_A, lora_B, bias, scaling, dropout_p)


def _autocast(x, weight, lora_A, lora_B, bias):
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.dtype in _CAST else t

    if x.dtype not in _CAST:
        return x, weight, lora_A, lora_B, bias
    # Float32 adapters are kept: the operator takes them.
    if lora_A is not None and lora_A.dtype != torch.float32:
        lora_A, lora_B = cast(lora_A), cast(lora_B)
    return cast(x), cast(weight), lora_A, lora_B, cast(bias)


def _check_types(x, weight, lora_A, lora_B, bias):
    given = {"x": x, "weight": weight, **_factors(lora_A, lora_B), "bias": bias}
    for name, t in given.items():
        if not isinstance(t, Tensor) and not (t is None and name == "bias"):
            or_none = " or None" if name == "bias" else ""
            raise TypeError(f"{name} must be a Tensor{or_none}, got {type(t).__name__}")
    for name, t in given.items():
        if t is not None and t.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got a tensor of layout {t.layout}")


def _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p):
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension ([..., K]), got a scalar")
    n, k = weight.shape[0] if weight.dim() else 0, x.shape[-1]
    _check_shape("weight", weight, ("N", k), f"x {tuple(x.shape)}")
    if lora_A is not None:
        _check_shape("lora_A", lora_A, ("R", k), f"x {tuple(x.shape)}")
        r = lora_A.shape[0]
        if r < 1:
            raise ValueError(f"lora_A must have rank at least 1, got shape {tuple(lora_A.shape)}")
        beside = f"weight {tuple(weight.shape)} and lora_A {tuple(lora_A.shape)}"
        _check_shape("lora_B", lora_B, (n, r), beside)
    if bias is not None:
        _check_shape("bias", bias, (n,), "weight")
    _check_dtypes(x, weight, lora_A, lora_B, bias)
    for name, t in {"weight": weight, **_factors(lora_A, lora_B), "bias": bias}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.device not in (x.device, torch.device("cpu")):
            raise ValueError(
                f"scaling must be a number or a 0-d tensor on {x.device}, got shape "
                f"{tuple(scaling.shape)} on {scaling.device}"
            )
        if scaling.is_complex():
            raise TypeError(f"scaling must be a real number, got a tensor of {scaling.dtype}")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float, torch.SymFloat)):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    elif not torch.compiler.is_compiling() and not abs(scaling) <= LARGEST:
        raise ValueError(f"scaling must be finite in float32, got {scaling}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def _check_shape(name: str, t: Tensor, sizes: tuple, beside: str) -> None:
    """Raise unless ``t`` has ``sizes``, of which a letter may be any."""
    shape = tuple(t.shape)
    if len(shape) != len(sizes):
        raise ValueError(f"{name} must be {len(sizes)}-D, got shape {shape}")
    if any(
        type(size) is not str and size != there for size, there in zip(sizes, shape, strict=True)
    ):
        listed = ", ".join(map(str, sizes))
        raise ValueError(f"{name} must be [{listed}] to match {beside}, got {shape}")


def _check_dtypes(x, weight, lora_A, lora_B, bias):
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x ({x.dtype}), got {t.dtype}")
    allowed = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    for name, t in _factors(lora_A, lora_B).items():
        if t.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"{name} must be {names} for x of {x.dtype}, got {t.dtype}")
    if lora_A is not None and lora_A.dtype != lora_B.dtype:
        raise TypeError(
            f"lora_B must have the dtype of lora_A ({lora_A.dtype}), got {lora_B.dtype}"
        )


def _factors(lora_A, lora_B) -> dict:
    """Return the factors of an adapter by name, none where there is none."""
    return {} if lora_A is lora_B is None else {"lora_A": lora_A, "lora_B": lora_B}
