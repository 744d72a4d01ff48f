# SPDX-License-Identifier: Apache-2.0
"""`lora_linear`: checks its arguments, then calls the operator."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastlora.operator import eager, plans
from fastlora.operator.dropout import new_seed
from fastlora.operator.op import PLAIN, run
from fastlora.operator.operands import Operands, Projection, Segments, with_scaling
from fastlora.operator.segments import stacked, together
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
    x: Tensor,
    projections: Sequence[Projection],
    *,
    segments: Sequence[int] | Tensor | None = None,
    training: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    """Return what `lora_linear` does for each of several projections of one x, such as q, k and v.

    They may differ in all but K: width, rank, bias, scaling, dropout, and in whether they have an
    adapter at all. x is read once for all of them where that is faster, and its gradient is added
    up as it is made. Each drops its own elements of x.

    ``segments`` [G + 1] cuts the rows of x (all leading dimensions flattened), from 0 to their
    number: the rows from segments[g] on meet the adapter g of each projection, in one product with
    the weight. ``lora_A`` [G, R, K] and ``lora_B`` [G, N, R] are then stacked, or sequences of G
    whose ranks may differ and which may hold None, for no adapter; ``scaling`` and ``dropout_p``
    are of all or sequences of G. A segment may have no rows: its gradients are zero. What a row
    drops depends on its number alone.

    Weights [G, N, K] are stacked as well, each for its segment, as those of a mixture of experts
    are; with factors and biases [G, N], or without adapters. ``scaling`` and ``dropout_p`` are then
    of all. ``segments`` may be a tensor (int32 or int64, on x's device): a GPU's is not waited for,
    and has to be right. A ``scale`` goes with segments that drop nothing, not with stacked weights.

    Shapes: ``x`` [..., K]; a list of [..., N], one for each projection, each a tensor of its own.
    Dtypes, ``training``, ``impl`` and errors as for `lora_linear`; an error says which projection
    is wrong.
    """
    if not len(projections):
        raise ValueError("projections must hold at least one, got none")
    ends = None
    if segments is not None:
        if any(isinstance(one[0], Tensor) and one[0].dim() == 3 for one in projections):
            ends = _stack_ends(x, segments)
        else:
            projections = list(_by_segment(projections, _ends(x, segments), training))
    return list(run_checked(*checked(x, projections, ends=ends), training, impl, ends))


def _stack_ends(x: Tensor, segments: Sequence[int] | Tensor) -> Tensor:
    """Return segments as a tensor on x's device, checked where nobody has to wait for it."""
    if not isinstance(segments, Tensor):
        return torch.tensor(_ends(x, segments), dtype=torch.int32, device=x.device)
    right = segments.dim() == 1 and segments.dtype in (torch.int32, torch.int64)
    if not right or segments.device != x.device:
        found = f"{tuple(segments.shape)} of {segments.dtype} on {segments.device}"
        raise ValueError(f"segments must be [G + 1] integers on {x.device}, got {found}")
    if segments.is_cpu and not is_compiling():
        _ends(x, segments)
    return segments.int()


def _ends(x: Tensor, segments: Sequence[int] | Tensor) -> list[int]:
    rows, ends = math.prod(x.shape[:-1]), list(map(int, segments))
    falls = any(start > end for start, end in itertools.pairwise(ends))
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != rows or falls:
        of = f"the rows of x {tuple(x.shape)}"
        raise ValueError(f"segments must rise from 0 to {rows}, {of}, got {ends!r:.100}")
    return ends


def _by_segment(
    projections: Sequence[Projection], ends: list[int], training: bool
) -> Iterator[Projection]:
    """Yield each projection without an adapter, then its adapters with their rows as weights."""
    G = len(ends) - 1
    for i, one in enumerate(projections):
        yield Projection(one.weight, bias=one.bias, scale=one.scale)
        each = []
        for name, given in zip(Projection._fields[1:], one[1:], strict=True):
            if name in ("bias", "scale"):
                continue
            several = isinstance(given, Sequence) or (isinstance(given, Tensor) and given.dim() > 0)
            if several and len(given) != G:
                raise ValueError(f"projections[{i}]: {name} must be of {G}, got {len(given)}")
            each.append(given if several else [given] * G)
        if training and one.scale is not None and any(each[-1]):
            said = f"projections[{i}]: dropout_p must be 0 in training with segments under a scale"
            raise ValueError(f"{said}, got {one.dropout_p!r:.100}")
        for start, end, a, b, scaling, p in zip(ends, ends[1:], *each, strict=False):
            if a is not None or b is not None:
                yield Projection(slice(start, end), a, b, None, scaling, p)


def add_low_rank(y: Tensor, x: Tensor, adapters: Sequence[Projection]) -> Tensor:
    """Return y [..., N], a frozen layer's output for x [..., K], plus what adapters make of x.

    That is written into y, which nothing else may hold. Dtypes as for `lora_linear`.
    """
    if x.dtype != y.dtype:  # under autocast
        x = x.to(y.dtype)
    there = Projection(None, bias=_unsafe_view(y, (math.prod(y.shape[:-1]), y.shape[-1])))
    impl = "auto" if plans.FORCED == "auto" else plans.named("auto", x)
    flat, operands = drawn(x, [there, *map(_numbered, adapters)], True, impl)
    (y,) = run(flat, operands, impl)
    return shaped(y, x.shape)


def checked(
    x: Tensor,
    projections: Sequence[Projection],
    name: str = "projections[{}]{}",
    ends: Tensor | None = None,
) -> tuple[Tensor, Sequence[Projection]]:
    """Return x and projections as `run_checked` takes them, or raise as `lora_linears` does.

    With the ``ends`` of segments all is stacked, each for one of them.
    """
    G = None if ends is None else len(ends) - 1
    try:
        key = _key(x, projections, G)
        if key is not None and key in _right:  # a compiler would guard what has been found right
            return x, projections
    except (AttributeError, TypeError, ValueError):  # not tensors, or their sizes are symbols
        key = None
    found, i, weight = [], -1, None
    for projection in projections:
        rows = projection[0]
        if type(rows) is not slice:
            i += 1
        elif weight is not None:  # one more adapter of the projection before
            projection = projection._replace(weight=weight)
        try:
            x, one = _checked(x, projection, G)
        except (TypeError, ValueError) as error:
            of = f", rows {rows.start} to {rows.stop}: " if type(rows) is slice else ": "
            raise type(error)(name.format(i, of) + str(error)) from None
        weight = one.weight
        found.append(one._replace(weight=rows) if type(rows) is slice else one)
    if key is not None:
        _right.add(key)
    return x, found


def run_checked(
    x: Tensor,
    projections: Sequence[Projection],
    training: bool,
    impl: str = "auto",
    ends: Tensor | None = None,
) -> Sequence[Tensor]:
    """Return y [..., N] of each projection of x [..., K] once everything is checked."""
    if impl != "auto" or plans.FORCED != "auto":
        impl = plans.named(impl, x)
    flat, operands = drawn(x, projections, training, impl, ends)
    if impl == "reference":
        ys = exactly(x.device, eager.outputs, flat, operands, True, True)
    else:
        ys = run(flat, operands, impl)
    return ys if flat is x else [shaped(y, x.shape) for y in ys]


def drawn(
    x: Tensor,
    projections: Sequence[Projection],
    training: bool,
    impl: str = "auto",
    ends: Tensor | None = None,
) -> tuple[Tensor, list[Operands]]:
    """Return x as [M, K] and each projection with a seed where it drops, and its segments."""
    operands, columns, of_rows, segmented = [], None, None, False
    for w, a, b, bias, scaling, p, scale in projections:
        if type(w) is not slice:
            columns = scale
        if columns is not None and b is not None:
            b = (b * columns.unsqueeze(1)).to(b.dtype)
        seed, some_rows = None, type(w) is slice and w.start is not None
        if training and p and a is not None:
            seed = of_rows if some_rows and of_rows is not None else new_seed(x.device)
            of_rows = seed if some_rows else None
        elif type(w) is not slice:
            of_rows = None
        segmented |= some_rows
        if ends is not None:
            scaling = Segments(ends, (scaling,), (p,))
        operands.append(Operands(w, a, b, bias, seed, scaling, p, scale))
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(math.prod(shape[:-1]), shape[-1])
    if segmented and not is_compiling():
        impl = impl if impl != "auto" else plans.default(x.dtype, x.device)[0]
        kernels = impl in ("triton", "library")
        operands = stacked(operands, len(flat)) if kernels else together(operands)
    return flat, operands


def shaped(y: Tensor, shape: torch.Size) -> Tensor:
    """Return y [M, N] as [..., N] for x of ``shape`` [..., K]; as little a view as y itself.

    What is written into an output, or detaches it, must be able to after `torch.no_grad` as well.
    """
    return _unsafe_view(y, (*shape[:-1], y.shape[1]))


_SIZES = {"weight": "NK", "lora_A": "RK", "lora_B": "NR", "bias": "N", "scale": "N"}
_WEIGHTS = {*PLAIN, Quantised, slice}  # as the operator takes them
# Dtypes, sizes, devices and layouts of arguments that were found right.
_right: set[tuple] = set()


def _checked(x: Tensor, projection: Projection, G: int | None) -> tuple[Tensor, Projection]:
    """Return x and a projection of it as the operator takes them, or raise.

    With G, how many of each are stacked.
    """
    weight, a, b, bias, scaling, dropout_p, scale = projection
    if isinstance(weight, Tensor) and type(weight) not in PLAIN and x.is_floating_point():
        found = quantised(weight, x.dtype)
        if type(found) is str and not weight.is_floating_point():
            raise TypeError(f"weight {found}")
        weight = weight if type(found) is str else found
    factors = {} if a is b is None else {"lora_A": a, "lora_B": b}
    rest = {name: t for name, t in (("bias", bias), ("scale", scale)) if t is not None}
    given = {"x": x, "weight": weight, **factors, **rest}
    if scale is not None and G is not None:
        raise ValueError("scale must be None for stacked weights, as experts have")
    _check_types(given)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        given = _autocast(given, torch.get_autocast_dtype(x.device.type))
    _check(given, G)
    _check_numbers(scaling, dropout_p, x.device)
    weight, a, b, bias, scale = map(given.get, _SIZES)
    return given["x"], _numbered(Projection(weight, a, b, bias, scaling, dropout_p, scale))


def _numbered(one: Projection) -> Projection:
    """Return a projection whose scaling is a number: what a tensor says goes into the factors."""
    if not isinstance(one.scaling, Tensor):
        return one
    a, b = one[1:3] if one.lora_A is None else with_scaling(*one[1:3], one.scaling)
    return one._replace(lora_A=a, lora_B=b, scaling=1.0)


def _key(x: Tensor, projections: Sequence[Projection], G: int | None) -> tuple | None:
    """Return what makes arguments right or wrong, None where there may be more to it."""
    if is_compiling() or torch._C._is_any_autocast_enabled():
        return None
    key = [x.dtype, x.size()[-1:], x.device, x.layout, G]
    for *tensors, scaling, p, scale in projections:
        tensors.append(scale)
        if not type(scaling) is type(p) is float or type(tensors[0]) not in _WEIGHTS:
            return None
        if not (-LARGEST <= scaling <= LARGEST and 0.0 <= p <= 1.0):
            return None
        for t in tensors:
            there = t is not None and type(t) is not slice
            key += (t.dtype, t.size(), t.device, t.layout) if there else (type(t),)
    return tuple(key)


def _autocast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if given["x"].dtype not in _CAST:
        return given
    # Float32 adapters and scales are kept: the operator takes them.
    of = {"lora_A": "lora_A", "lora_B": "lora_A", "scale": "scale"}
    kept = [name for name, of in of.items() if of in given and given[of].dtype == torch.float32]
    return {
        name: t if t.dtype not in _CAST or name in kept else t.to(dtype)
        for name, t in given.items()
    }


def _check_types(given: dict) -> None:
    for name, t in given.items():
        if not isinstance(t, Tensor) and not isinstance(t, Quantised):
            or_none = " or None" if name in ("bias", "scale") else ""
            raise TypeError(f"{name} must be a Tensor{or_none}, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise TypeError(f"{name} must be dense, got a tensor of layout {t.layout}")


def _check(given: dict[str, Tensor], G: int | None) -> None:
    """Raise unless dimensions, dtypes and devices fit those of the tensors before."""
    x = given["x"]
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension ([..., K]), got a scalar")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    sizes, stacked = {"K": x.shape[-1], "G": G}, "" if G is None else "G"
    for name in list(given)[1:]:
        t, shape = given[name], tuple(given[name].shape)
        letters = stacked + _SIZES[name]
        wanted = [sizes.get(letter, letter) for letter in letters]
        if len(shape) != len(wanted):
            raise ValueError(f"{name} must be {len(wanted)}-D, got shape {shape}")
        pairs = zip(wanted, shape, strict=True)
        if any(type(size) is not str and size != there for size, there in pairs):
            before = list(given)[: list(given).index(name)]
            beside = " and ".join(f"{of} {tuple(given[of].shape)}" for of in before)
            listed = ", ".join(map(str, wanted))
            raise ValueError(f"{name} must be [{listed}] to match {beside}, got {shape}")
        if name == "lora_A" and shape[-2] < 1:
            raise ValueError(f"lora_A must have rank at least 1, got shape {shape}")
        of = "lora_A" if name == "lora_B" else "x"
        dtype, wide = given[of].dtype, name in ("lora_A", "scale") and x.dtype.itemsize == 2
        if t.dtype != dtype and not (wide and t.dtype == torch.float32):
            or_wide = " or be torch.float32" if wide else ""
            raise TypeError(f"{name} must have the dtype of {of} ({dtype}){or_wide}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}")
        sizes |= zip(letters, shape, strict=True)


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
    check_dropout(dropout_p, "dropout_p")


def check_dropout(p: float, name: str) -> None:
    """Raise TypeError or ValueError unless an argument of that name is a probability."""
    if not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {p}")
