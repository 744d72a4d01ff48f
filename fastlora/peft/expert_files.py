# SPDX-License-Identifier: Apache-2.0
"""Adapters of experts in files: all in one tensor, as PEFT has them, or each by itself.

Servers such as vLLM and SGLang read the latter where checkpoints do: ``experts.3.up_proj.lora_A``.
What is called so, transformers knows, which joins the weights of such checkpoints.
"""

import itertools
import math
import re
from collections import defaultdict
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from fastlora.peft.experts import name_of

_KEY = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight")
_PREFIX = "base_model.model."
_NEW = (0, 19, 1)  # PEFT before it took rows of experts' weights for columns


def checkpoint_names(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Return what checkpoints call the parts of each expert's weights, and modules above them.

    By parameter; and pairs of parts of paths, in checkpoints and in the model.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

        conversions = get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # it is none of transformers', or transformers is older
        return {}, []
    parts, renamed = {}, []
    for one in conversions:
        (target, *more), sources = one.target_patterns, one.source_patterns
        if not isinstance(one, WeightConverter):
            if not more and len(sources) == 1 and re.fullmatch(r"\.\w+\.", sources[0]):
                renamed.append((sources[0], target))
        elif ".experts." in f".{target}" and not more:
            joined = all(isinstance(of, Concatenate | MergeModulelist) for of in one.operations)
            names = [source.removesuffix(".weight").rpartition(".")[2] for source in sources]
            parts |= {target.rpartition(".")[2]: tuple(names)} if joined else {}
    return parts, renamed


def by_expert(
    model: nn.Module, adapter: str, tensors: dict[str, Tensor], values: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config of a file that has each expert by itself.

    Raises ValueError where checkpoints of this model don't.
    """
    parts, renamed = checkpoint_names(model.get_base_model())
    tensors, values, found = dict(tensors), dict(values), set()
    for path, layer in model.named_modules():
        if not isinstance(layer, ParamWrapper) or adapter not in layer.lora_A:
            continue
        name = name_of(path, layer)
        if layer.parameter_name not in parts:
            why = "checkpoints of its model hold all experts in one tensor, as PEFT's files do"
            raise ValueError(f"per_expert: {name} has no names for single experts: {why}")
        a, b = (tensors.pop(f"{path}.lora_{part}.weight") for part in "AB")
        a, b = a.unflatten(0, (layer.num_experts, -1)), b.unflatten(1, (-1, layer.num_experts))
        b = b * (layer.scaling[adapter] / _scaling(values, values["r"], values["lora_alpha"]))
        above = name.rpartition(".")[0]
        for theirs, ours in renamed:
            above = above.replace(ours, theirs)
        names = parts[layer.parameter_name]
        for e in range(layer.num_experts):
            for part, b_e in zip(names, b[..., e].chunk(len(names)), strict=True):
                tensors[f"{above}.{e}.{part}.lora_A.weight"] = a[e].clone()
                tensors[f"{above}.{e}.{part}.lora_B.weight"] = b_e.contiguous()
        found |= {*names}
        for key in ("rank_pattern", "alpha_pattern"):  # scaled in, and seen by shapes
            own = values.get(key) or {}
            values[key] = {k: v for k, v in own.items() if not re.fullmatch(rf"(.*\.)?({k})", name)}
    if found:
        modules = values.get("target_modules") or []
        alone = rf".*\.experts\.\d+\.({'|'.join(sorted(found))})"
        listed = not isinstance(modules, str)
        values["target_modules"] = sorted({*modules, *found}) if listed else f"{modules}|{alone}"
        values["target_parameters"] = None
    return tensors, values


def _scaling(values: dict[str, Any], r: int, alpha: float = 1.0) -> float:
    return alpha / (math.sqrt(r) if values.get("use_rslora") else r)


class Joined:
    """A file that has each expert by itself, read as one of PEFT's; all others as they are.

    ``values``, the file's config, are changed to that. Raises ValueError where an expert lacks a
    part, or has one of another size.
    """

    def __init__(self, weights: Any, model: nn.Module, values: dict[str, Any]) -> None:
        self._weights, self._made, self._others = weights, {}, []
        self.peft_wrote_experts = bool(values.get("target_parameters"))
        experts: dict[str, dict] = defaultdict(dict)
        for key in list(weights.keys()):
            match = _KEY.fullmatch(key) if values["peft_type"] == "LORA" else None
            if match is None:
                self._others.append(key)
            else:
                above, e, part, of = match.groups()
                experts[above][int(e), part, of] = key
        if experts:
            self._join(experts, model, values)

    def keys(self) -> list[str]:
        return [*self._others, *self._made]

    def get_slice(self, key: str) -> Any:
        return _Whole(self._made[key]) if key in self._made else self._weights.get_slice(key)

    def get_tensor(self, key: str) -> Tensor:
        return self._made[key] if key in self._made else self._weights.get_tensor(key)

    def _join(self, experts: dict[str, dict], model: nn.Module, values: dict[str, Any]) -> None:
        parts, renamed = checkpoint_names(model)
        own, modules = dict(model.named_parameters()), dict(model.named_modules())
        ranks, alphas = (dict(values.get(f"{of}_pattern") or {}) for of in ("rank", "alpha"))
        scaling = _scaling(values, values.get("r", 8), values.get("lora_alpha", 8))
        targets, leaves = set(values.get("target_parameters") or ()), set()
        for above, keys in experts.items():
            path = above.removeprefix(_PREFIX)
            for theirs, ours in renamed:
                path = path.replace(theirs, ours)
            if any(str(e) in getattr(modules.get(path), "_modules", ()) for e, _, _ in keys):
                self._others += keys.values()  # they are modules, as any others
                continue
            adapted = [name for name in parts if {*parts[name]} & {part for _, part, _ in keys}]
            for name in adapted:
                weight = own.get(f"{path}.{name}", own.get(f"{path}.base_layer.{name}"))
                E = 0 if weight is None else len(weight)
                whole = set(itertools.product(range(E), parts[name], "AB"))
                if not whole or whole - keys.keys():
                    less = f"lacks {min(whole - keys.keys())}" if whole else "is not of this model"
                    raise ValueError(f"{above[:200]}, which has experts by themselves, {less}")
                each = {of: keys.pop(of) for of in whole}
                a, b = self._stacks(parts[name], E, each)
                inside = ".base_layer" if len(adapted) > 1 and name != "down_proj" else ""
                at, target, rank = f"{_PREFIX}{path}{inside}.lora_", f"{path}.{name}", a.shape[1]
                self._made[f"{at}A.weight"] = a.flatten(0, 1)
                self._made[f"{at}B.weight"] = b.permute(1, 2, 0).flatten(1, 2)
                ranks[re.escape(target)] = rank
                alphas[re.escape(target)] = scaling / _scaling(values, rank)
                targets.add(target)
                leaves |= {*parts[name]}
            if keys:
                raise ValueError(f"{above[:200]} has parts that the model lacks: {min(keys)}")
        if isinstance(values.get("target_modules"), list):
            gone = leaves - {key.split(".lora_")[0].rpartition(".")[2] for key in self._others}
            kept = [m for m in values["target_modules"] if m.rpartition(".")[2] not in gone]
            values["target_modules"] = kept
        values |= {"rank_pattern": ranks, "alpha_pattern": alphas}
        values["target_parameters"] = sorted(targets)

    def _stacks(self, parts: tuple[str, ...], E: int, keys: dict) -> tuple[Tensor, Tensor]:
        """Return [E, R, K] and [E, N, R] of parts of which each may have a rank of its own."""
        stacks = {}
        for part, of in itertools.product(parts, "AB"):
            each = [self._weights.get_tensor(keys[e, part, of]) for e in range(E)]
            if len({(t.shape, t.dtype) for t in each}) > 1 or each[0].dim() != 2:
                raise ValueError(f"experts differ in the sizes or dtypes of {part}.lora_{of}")
            stacks[part, of] = torch.stack(each)
        a, b = ([stacks[part, of] for part in parts] for of in "AB")
        fit = [t.shape[1] for t in a] == [t.shape[2] for t in b]
        if not fit or len({t.dtype for t in a + b}) > 1 or len({t.shape[2] for t in a}) > 1:
            raise ValueError(
                f"lora_A and lora_B of experts' {', '.join(parts)} do not fit together"
            )
        if all(t.shape == a[0].shape and torch.equal(t, a[0]) for t in a):
            return a[0], torch.cat(b, 1)
        blocks = [torch.block_diag(*(t[e] for t in b)) for e in range(E)]
        return torch.cat(a, 1), torch.stack(blocks)


class _Whole:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


def check_layout(version: Any, expected: dict[str, Tensor]) -> None:
    """Raise ValueError where an older PEFT may have written experts' rows for columns, unseen."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found and tuple(map(int, found.groups())) >= _NEW:
        return
    for key, a in expected.items():
        b = expected.get(key.replace(".lora_A.", ".lora_B."))
        if ".experts." in key and ".lora_A." in key and a.shape[1] == b.shape[0]:
            raise ValueError(
                f"{key} is square, and written by PEFT {version or 'of some release'}: "
                "before 0.19.1 rows and columns of experts' weights were the other way round"
            )
