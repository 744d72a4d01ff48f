# SPDX-License-Identifier: Apache-2.0
"""`lora_linear`: checks its arguments, then calls the operator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastlora.operator import plans
from fastlora.operator.dropout import new_seed
from fastlora.operator.eager import reference
from fastlora.operator.op import PLAIN, run
from fastlora.operator.operands import Operands, Projection, with_scaling
from fastlora.operator.steps import exactly
from fastlora.operator.weights import Quantised, quantised

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
    one = Projection(weight, lora_A, lora_B, bias, scaling, dropout_p)
    return run_checked(*checked(x, [one], ""), training, impl)[0]


def lora_linears(
    x: Tensor, projections: Sequence[Projection], *, training: bool = False, impl: str = "auto"
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
    return list(run_checked(*checked(x, projections), training, impl))


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling, p: float) -> Tensor:
    """Return y [..., N], a frozen layer's output for x [..., K], plus what an adapter makes of x.

    That is written into y, which nothing else may hold. Dtypes as for `lora_linear`.
    """
    a, b, scaling = _numbered(a, b, scaling)
    if x.dtype != y.dtype:  # under autocast
        x = x.to(y.dtype)
    there = _unsafe_view(y, (math.prod(y.shape[:-1]), y.shape[-1]))
    flat, operands = drawn(x, [Projection(None, a, b, there, scaling, p)], p > 0.0)
    (y,) = run(flat, operands, "auto" if plans.FORCED == "auto" else plans.named("auto", x))
    return shaped(y, x.shape)


def checked(
    x: Tensor, projections: Sequence[Projection], name: str = "projections[{}]: "
) -> tuple[Tensor, Sequence[Projection]]:
    """Return x and projections as `run_checked` takes them, or raise as `lora_linears` does."""
    try:
        key = _key(x, projections)
        if key is not None and key in _right:  # a compiler would guard what has been found right
            return x, projections
    except (AttributeError, TypeError, ValueError):  # not tensors, or their sizes are symbols
        key = None
    found = []
    for i, projection in enumerate(projections):
        try:
            x, one = _checked(x, projection)
        except (TypeError, ValueError) as error:
            raise type(error)(name.format(i) + str(error)) from None
        found.append(one)
    if key is not None:
        _right.add(key)
    return x, found


def run_checked(
    x: Tensor, projections: Sequence[Projection], training: bool, impl: str = "auto"
) -> Sequence[Tensor]:
    """Return y [..., N] of each projection of x [..., K] once everything is checked."""
    if impl != "auto" or plans.FORCED != "auto":
        impl = plans.named(impl, x)
    flat, operands = drawn(x, projections, training)
    if impl == "reference":
        ys = [exactly(x.device, reference, flat, *one) for one in operands]
    else:
        ys = run(flat, operands, impl)
    return ys if flat is x else [shaped(y, x.shape) for y in ys]


def drawn(
    x: Tensor, projections: Sequence[Projection], training: bool
) -> tuple[Tensor, list[Operands]]:
    """Return x as [M, K] and each projection with a seed where it drops."""
    operands = []
    for w, a, b, bias, scaling, p in projections:
        seed = new_seed(x.device) if training and p and a is not None else None
        operands.append(Operands(w, a, b, bias, seed, scaling, p))
    shape = x.shape
    return x if len(shape) == 2 else x.reshape(math.prod(shape[:-1]), shape[-1]), operands


def shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """Return y [M, N] as [..., N] for x of ``shape`` [..., K]; as little a view as y itself.

    What is written into an output, or detaches it, must be able to after `torch.no_grad` as well.
    """
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))


_SIZES = {"weight": "NK", "lora_A": "RK", "lora_B": "NR", "bias": "N"}
_WEIGHTS = {*PLAIN, Quantised}  # as the operator takes them
# Dtypes, sizes, devices and layouts of arguments that were found right.
_right: set[tuple] = set()


def _checked(x: Tensor, projection: Projection) -> tuple[Tensor, Projection]:
    """Return x and a projection of it as the operator takes them, or raise."""
    weight, a, b, bias, scaling, dropout_p = projection
    if isinstance(weight, Tensor) and type(weight) not in PLAIN and x.is_floating_point():
        found = quantised(weight, x.dtype)
        if type(found) is str and not weight.is_floating_point():
            raise TypeError(f"weight {found}")
        weight = weight if type(found) is str else found
    factors = {} if a is b is None else {"lora_A": a, "lora_B": b}
    given = {"x": x, "weight": weight, **factors, **({} if bias is None else {"bias": bias})}
    _check_types(given)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        given = _autocast(given, torch.get_autocast_dtype(x.device.type))
    _check(given)
    _check_numbers(scaling, dropout_p, x.device)
    weight, a, b, bias = map(given.get, ("weight", "lora_A", "lora_B", "bias"))
    a, b, scaling = _numbered(a, b, scaling)
    return given["x"], Projection(weight, a, b, bias, scaling, dropout_p)


def _numbered(a: Tensor | None, b: Tensor | None, scaling: float | Tensor) -> tuple:
    """Return factors and a number as their scaling, with what a tensor says in the factors."""
    if not isinstance(scaling, Tensor):
        return a, b, scaling
    return (a, b, 1.0) if a is None else (*with_scaling(a, b, scaling), 1.0)


def _key(x: Tensor, projections: Sequence[Projection]) -> tuple | None:
    """Return what makes arguments right or wrong, None where there may be more to it."""
    if is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    key = [x.dtype, x.size()[-1:], x.device, x.layout]
    for *tensors, scaling, p in projections:
        if not type(scaling) is type(p) is float or type(tensors[0]) not in _WEIGHTS:
            return None
        if not (-LARGEST <= scaling <= LARGEST and 0.0 <= p <= 1.0):
            return None
        for t in tensors:
            key += (None,) if t is None else (t.dtype, t.size(), t.device, t.layout)
    return tuple(key)


def _autocast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if given["x"].dtype not in _CAST:
        return given
    # Float32 adapters are kept: the operator takes them.
    wide = "lora_A" in given and given["lora_A"].dtype == torch.float32
    return {
        name: t if t.dtype not in _CAST or (wide and name.startswith("lora")) else t.to(dtype)
        for name, t in given.items()
    }


def _check_types(given: dict) -> None:
    for name, t in given.items():
        if not isinstance(t, Tensor) and not isinstance(t, Quantised):
            or_none = " or None" if name == "bias" else ""
            raise TypeError(f"{name} must be a Tensor{or_none}, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got a tensor of layout {t.layout}")


def _check(given: dict[str, Tensor]) -> None:
    """Raise unless dimensions, dtypes and devices fit those of the tensors before."""
    x = given["x"]
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension ([..., K]), got a scalar")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    sizes = {"K": x.shape[-1]}
    for name in list(given)[1:]:
        t, shape = given[name], tuple(given[name].shape)
        wanted = [sizes.get(letter, letter) for letter in _SIZES[name]]
        if len(shape) != len(wanted):
            raise ValueError(f"{name} must be {len(wanted)}-D, got shape {shape}")
        pairs = zip(wanted, shape, strict=True)
        if any(type(size) is not str and size != there for size, there in pairs):
            before = list(given)[: list(given).index(name)]
            beside = " and ".join(f"{of} {tuple(given[of].shape)}" for of in before)
            listed = ", ".join(map(str, wanted))
            raise ValueError(f"{name} must be [{listed}] to match {beside}, got {shape}")
        if name == "lora_A" and shape[0] < 1:
            raise ValueError(f"lora_A must have rank at least 1, got shape {shape}")
        of = "lora_A" if name == "lora_B" else "x"
        dtype, wide = given[of].dtype, name == "lora_A" and x.dtype.itemsize == 2
        if t.dtype != dtype and not (wide and t.dtype == torch.float32):
            or_wide = " or be torch.float32" if wide else ""
            raise TypeError(f"{name} must have the dtype of {of} ({dtype}){or_wide}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")
        for letter, size in zip(_SIZES[name], shape, strict=True):
            sizes[letter] = size


def _check_numbers(scaling, dropout_p, device: torch.device) -> None:
    if isinstance(scaling, Tensor):
        if scaling.dim() or scaling.device not in (device, torch.device("cpu")):
            raise ValueError(
                f"scaling must be a number or a 0-d tensor on {device}, got shape "
                f"{tuple(scaling.shape)} on {scaling.device}"
            )
        if scaling.is_complex():
            raise TypeError(f"scaling must be a real number, got a tensor of {scaling.dtype}")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float, torch.SymFloat)):
        raise TypeError(f"scaling must be a number or a 0-d tensor, got {type(scaling).__name__}")
    elif not is_compiling() and not abs(scaling) <= LARGEST:
        raise ValueError(f"scaling must be finite in float32, got {scaling}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
