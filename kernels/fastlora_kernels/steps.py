# SPDX-License-Identifier: Apache-2.0
"""A LoRA linear layer, and several of one x, in five steps: each a launch for up to four of them.

``x`` is [M, K]. A projection is a tuple of w [N, K], a [R, K], b [N, R], bias [N], seed ([1],
int64), scaling and dropout's p, tensors of any strides; a and b are None without an adapter, seed
without dropout. Adapters are of the dtype of x or float32. Lists may be of any length. ``configs``
may hold one for each step, by the step's name; others take their default.

With ``segments`` a and b are stacks [G, R, K] and [G, N, R], each of whose G is for a run of rows,
and so are da and db. w [G, N, K] and bias [G, N] may be stacks as well, as those of a mixture of
experts are: the w of all projections then, and all biases that there are. Segments are the offsets
[G + 1], int32, from 0 to M, and for each projection that has a stack, frozen experts too, its
numbers, [3, G] in float32: scalings, 1 / (1 - p), and the least of the 16 bits drawn that is kept,
65536 p - 32768. The projection's own scaling and p do not count then. Dropout's rows are numbered
from the first of all.

An eighth field is a scale [N] for the columns of the frozen product, contiguous, in the dtype of x
or float32: the b of such a projection has been multiplied by it, and two steps have another form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import da as da_of
from fastlora_kernels import ds_db as ds_db_of
from fastlora_kernels import input_grad as input_grad_of
from fastlora_kernels import lists
from fastlora_kernels import outputs as outputs_of
from fastlora_kernels import shrink as shrink_of
from fastlora_kernels.configs import Config
from fastlora_kernels.dropout import keep_scales
from fastlora_kernels.dropped import dropped
from fastlora_kernels.launch import empty, noted
from fastlora_kernels.replay import replayed

Projections = Sequence[tuple]
Configs = Mapping[str, Config]
Maybe = Sequence[Tensor | None]
NO_CONFIGS: Configs = {}
_THE_ONE = [(0,)]


@replayed
def shrink(
    x: Tensor, projections: Projections, configs: Configs = NO_CONFIGS,
    segments: lists.Segments | None = None, *, for_outputs: bool = True,
) -> tuple[Maybe, Maybe | None]:  # fmt: skip
    """Return s_i = dropout_i(x) a_iᵀ [M, R_i] in a's dtype, contiguous, None without an adapter.

    Second, the same times the scaling for `outputs`, or None where that scales s itself, or s is
    not ``for_outputs`` of this file.
    """
    ss, scaled = [None] * len(projections), [None] * len(projections)
    for few in _groups(projections, adapted=True):
        w, a, b, _, seeds, scalings, p = _columns(projections, few)
        # What `outputs` folds in has to be scaled before. Float16 might overflow then.
        into = w, b, scalings, configs.get("outputs")
        folds = for_outputs and segments is None and a[0].dtype == x.dtype == torch.bfloat16
        of = configs.get("shrink"), *(into if folds else ())
        found, made = shrink_of.shrink(x, a, seeds, p, *of, segments=lists.of_few(segments, few))
        _put(found, ss, few)
        if made is not None:
            _put(made, scaled, few)
    return ss, scaled if any(s is not None for s in scaled) else None


@replayed
def outputs(
    x: Tensor, projections: Projections, ss: Maybe, scaled: Maybe | None = None,
    configs: Configs = NO_CONFIGS, segments: lists.Segments | None = None,
) -> list[Tensor]:  # fmt: skip
    """Return y_i = x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i [M, N_i] in the dtype of x.

    ``ss`` and ``scaled`` as `shrink` returns them. The results are contiguous.
    """
    ys = [None] * len(projections)
    for few in _groups(projections):
        w, _, b, biases, _, scalings, _ = _columns(projections, few)
        s = _taken(ss, few)
        if scaled is not None and all(scaled[i] is not None or ss[i] is None for i in few):
            s, scalings = _taken(scaled, few), (1.0,) * len(few)
        of = w, s, b, biases, scalings, configs.get("outputs")
        _put(outputs_of.outputs(x, *of, lists.of_few(segments, few)), ys, few)
    return ys


@replayed
def ds_db(
    dys: Maybe, projections: Projections, ss: Maybe,
    need_ds: Sequence[bool], need_db: Sequence[bool],
    configs: Configs = NO_CONFIGS, segments: lists.Segments | None = None,
) -> tuple[Maybe, Maybe]:  # fmt: skip
    """Return ds_i = scaling_i · dy_i b_i [M, R_i] and db_i = scaling_i · dy_iᵀ s_i [N_i, R_i].

    In b's dtype, each None where it is not needed, or there is no dy or no adapter.
    """
    dss, dbs = [None] * len(projections), [None] * len(projections)
    for few in _groups(projections, dys, adapted=True):
        _, _, b, _, _, scalings, _ = _columns(projections, few)
        needs = _taken(need_ds, few), _taken(need_db, few)
        of = _taken(dys, few), _taken(ss, few), b, scalings, *needs
        ds, db = ds_db_of.ds_db(*of, configs.get("ds_db"), lists.of_few(segments, few))
        _put(ds, dss, few)
        _put(db, dbs, few)
    return dss, dbs


@replayed
def scaled_outputs(
    x: Tensor, projections: Projections, ss: Maybe, keep: bool = True, zs: Maybe | None = None
) -> tuple[list[Tensor], Maybe]:
    """Return y_i = scale_i ∘ x w_iᵀ + scaling_i · s_i b_iᵀ + bias_i, and z_i = x w_iᵀ + bias_i.

    Of projections with a scale and an adapter. Where dropout is drawn z_i is x̂ w_iᵀ of the elements
    that it keeps, not multiplied, and y_i = x w_iᵀ + (scale_i - 1) / (1 - p) ∘ z_i + ...; elsewhere
    it is made to ``keep``. ``zs`` may be there: the product is then z_i - bias_i, and w_i and x
    have no columns.
    """
    ys, zs = [None] * len(projections), list(zs or [None] * len(projections))
    for i, (w, *_, seed, _, p, _) in enumerate(projections):
        if seed is not None and zs[i] is None:
            frozen = (w, None, None, None, None, 1.0, 0.0)
            (zs[i],) = outputs(dropped(x, seed, p), [frozen], [None])
    for few in _groups(projections, scaled=zs):
        w, _, b, biases, seeds, scalings, p, scales = _columns(projections, few, 8)
        of = w, _taken(ss, few), b, biases, scalings
        z, new_z, kept = _taken(zs, few), None, None
        if z[0] is None:
            z = None
            if keep:
                new_z = tuple([empty(x, len(x), len(t)) for t in w])
                _put(new_z, zs, few)
        elif seeds[0] is not None:
            kept = lists.alike(keep_scales(seeds, p)[0])
        found = outputs_of.outputs(x, *of, columns=scales, z=z, new_z=new_z, kept=kept)
        _put(found, ys, few)
    return ys, zs


@replayed
def ds_db_of_scaled(
    dys: Maybe, projections: Projections, ss: Maybe, zs: Maybe,
    need_ds: Sequence[bool], need_db: Sequence[bool], need_dz: bool,
) -> tuple[Maybe, Maybe, Maybe, Maybe]:  # fmt: skip
    """Return ds_i and db_i as `ds_db`; dz_i = scale_i ∘ dy_i [M, N_i], and the gradient of scale_i.

    Of projections with a scale, that gradient where z_i is given, as `scaled_outputs` has it. Where
    dropout is drawn dz_i = (scale_i - 1) ∘ dy_i.
    """
    found = [[None] * len(projections) for _ in range(4)]
    for few in _groups(projections, dys, adapted=True):
        _, _, b, biases, seeds, scalings, p, scales = _columns(projections, few, 8)
        kept, columns = keep_scales(seeds, p)[0], []
        for i, bias, seed, scale, factor in zip(few, biases, seeds, scales, kept, strict=True):
            drops, z = seed is not None, zs[i]
            of_z = z, None if z is None or drops else bias, float(drops), factor
            columns.append(ds_db_of.Columns(scale, *of_z, need_dz))
        needs = _taken(need_ds, few), _taken(need_db, few)
        of = _taken(dys, few), _taken(ss, few), b, scalings, *needs
        for parts, into in zip(ds_db_of.ds_db(*of, columns=columns), found, strict=True):
            _put(parts, into, few)
    return tuple(found)


@replayed
def input_grad(
    dys: Maybe, projections: Projections, dss: Maybe,
    configs: Configs = NO_CONFIGS, segments: lists.Segments | None = None,
) -> Tensor | None:  # fmt: skip
    """Return dx = Σ (dy_i w_i + dropout_i'(ds_i a_i)) [M, K]; None where no dy is there."""
    dx = None
    for few in _groups(projections, dys):
        w, a, _, _, seeds, _, p = _columns(projections, few)
        of = _taken(dys, few), w, _taken(dss, few), a, seeds, p
        part = input_grad_of.input_grad(*of, configs.get("input_grad"), lists.of_few(segments, few))
        dx = part if dx is None else noted(Tensor.add_, dx, part)
    return dx


@replayed
def da(
    x: Tensor, projections: Projections, dss: Maybe, needs: Sequence[bool],
    configs: Configs = NO_CONFIGS, segments: lists.Segments | None = None,
) -> Maybe:  # fmt: skip
    """Return da_i = ds_iᵀ dropout_i(x) [R_i, K] in the dtype of ds, None where not needed.

    Two runs give the same bits, as those of `ds_db` do.
    """
    das = [None] * len(projections)
    asked = [ds if need else None for ds, need in zip(dss, needs, strict=True)]
    for few in _groups(projections, asked, adapted=True):
        _, _, _, _, seeds, _, p = _columns(projections, few)
        of = seeds, p, configs.get("da"), lists.of_few(segments, few)
        _put(da_of.da(x, _taken(dss, few), *of), das, few)
    return das


def _groups(
    projections: Projections, there: Maybe | None = None, adapted: bool = False,
    scaled: Maybe | None = None,
) -> list[Sequence[int]]:  # fmt: skip
    """Return which projections a launch can take: up to four, their adapters of one dtype.

    Those for which there is something in ``there``; only ``adapted`` ones, or the frozen as well.
    With their z, if these are ``scaled``: with scales of one dtype and the same way round.
    """
    if len(projections) == 1:  # a plain layer, on its way through every step
        nothing = there is not None and there[0] is None
        return [] if nothing or (adapted and projections[0][1] is None) else _THE_ONE
    found: dict[Any, list[int]] = {}
    for i, projection in enumerate(projections):
        if there is None or there[i] is not None:
            kind = a = projection[1]
            if a is not None:
                kind = a.dtype
            if scaled is not None:
                kind = kind, projection[7].dtype, scaled[i] is None, projection[4] is None
            found.setdefault(kind, []).append(i)
    frozen = found.pop(None, [])
    first, *others = found.values() or [[]]
    first = first if adapted else first + frozen
    most = lists.MOST
    return [same[i : i + most] for same in (first, *others) for i in range(0, len(same), most)]


def _columns(projections: Projections, few: Sequence[int], fields: int = 7) -> tuple[tuple, ...]:
    """Return what some of the projections are made of, a tuple for each field."""
    if len(few) == 1:
        return tuple([(value,) for value in projections[few[0]][:fields]])
    return tuple(zip(*[projections[i][:fields] for i in few], strict=True))


def _taken(values: Sequence, few: Sequence[int]) -> tuple:
    return tuple([values[i] for i in few])


def _put(parts: Sequence, into: list, few: Sequence[int]) -> None:
    for i, part in zip(few, parts, strict=True):
        into[i] = part
