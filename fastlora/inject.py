# SPDX-License-Identifier: Apache-2.0
"""`inject` puts an adapter under a model: everything is checked, then everything is changed."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlora import targets
from fastlora.config import LoRAConfig
from fastlora.injected import DEFAULT_ADAPTER
from fastlora.injected import InjectedLinear as LoRALinear
from fastlora.layers import sibling_search
from fastlora.layers.hyperparameters import (
    check_adapter_dtype,
    check_adapter_name,
    default_adapter_dtype,
)
from fastlora.layers.lora import is_conv1d, unsupported
from fastlora.model import (
    Record,
    adapter_names,
    all_records,
    disable_adapters,
    is_merged,
    parameters_of,
    records,
    set_adapter,
    unwrapped,
    walk,
)
from fastlora.trainable import TrainableModule

# The head that a task adds to a model, under transformers' names: untrained, so trained in full.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_PEFT_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_NO_STATE = nn.Module.get_extra_state
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass
class InjectReport:
    """What `inject` did; ``print`` it.

    ``replaced``: (name, in, out, r); ``trained``: (name, parameters) of modules trained in full;
    ``skipped``: (name, why) of other linear layers; ``trainable``, ``total``: parameter counts;
    ``siblings``, ``gated_mlps``: (module, children's names) of what runs as one operator.
    """

    adapter: str
    replaced: list[tuple[str, int, int, int]]
    trained: list[tuple[str, int]]
    skipped: list[tuple[str, str]]
    trainable: int
    total: int
    siblings: list[sibling_search.Names] = field(default_factory=list)
    gated_mlps: list[sibling_search.Names] = field(default_factory=list)

    @property
    def percentage(self) -> float:
        """Return how much of the parameters trains, in percent."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        lines = [
            f"adapter {self.adapter!r}: {len(self.replaced)} layers, {self.trainable:,} of "
            f"{self.total:,} parameters train ({self.percentage:.3g}%)"
        ]
        groups = Counter((_last(name), i, o, r) for name, i, o, r in self.replaced)
        rows = [(name, f"x{n}", f"{i}->{o}", f"r={r}") for (name, i, o, r), n in groups.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            lines.append("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
        lines += [f"  trained in full: {name} ({count:,})" for name, count in self.trained]
        together = Counter(f"siblings: {', '.join(names)}" for _, names in self.siblings)
        together.update(f"gated MLP: {', '.join(names)}" for _, names in self.gated_mlps)
        lines += [f"  {line} x{n}" if n > 1 else f"  {line}" for line, n in together.items()]
        reasons = defaultdict(Counter)
        for name, why in self.skipped:
            reasons[why][_last(name)] += 1
        lines += [f"  left alone, {why}: {_counted(names)}" for why, names in reasons.items()]
        return "\n".join(lines)


def inject(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str = DEFAULT_ADAPTER,
    *,
    adapter_dtype: torch.dtype | None = None,
    fuse_siblings: sibling_search.How = False,
) -> InjectReport:
    """Put an adapter into ``model``, in place, make it the active one and report what was done.

    Each ``nn.Linear`` and transformers ``Conv1D`` that ``config`` selects becomes a `LoRALinear`
    that shares its weight; modules in ``config.modules_to_save`` become `TrainableModule`. The
    first adapter freezes everything else; later ones leave the rest as it is. ``adapter_dtype``
    defaults to float32 under 16-bit weights and to the weights' dtype otherwise.

    With ``fuse_siblings`` layers that are called with the same tensor, such as q, k and v, run as
    one operator (`lora_linears`), the frozen ``nn.Linear`` among them included. True finds them by
    a forward on the small input that models of transformers bring along; for other models give an
    example input (a tensor, or a mapping of keyword arguments), or the names of children in the
    order of their calls: ``[("q", "k", "v"), ("gate", "up")]``.
    Raises ValueError or TypeError, naming what is wrong, before anything is changed.
    """
    made = plan(model, config, adapter, adapter_dtype)
    model = unwrapped(model)
    siblings = []
    if fuse_siblings is not False:
        adapted = [module for module, *_ in made.layers.values()]
        adapted += [module for module in model.modules() if isinstance(module, LoRALinear)]
        trained = [*made.trained.values()]
        trained += [m for m in model.modules() if isinstance(m, TrainableModule)]
        siblings = sibling_search.find(model, fuse_siblings, adapted)
    apply(model, made, adapter)
    report = made.report(model, adapter)
    report.siblings, report.gated_mlps = sibling_search.make(siblings)
    return report


@dataclass
class Plan:
    """What an adapter will be in one model. Names are those of checkpoints."""

    config: LoRAConfig
    layers: dict[str, tuple[nn.Module, int, float]]  # r, lora_alpha
    trained: dict[str, nn.Module]
    biases: dict[str, nn.Module]  # those whose bias trains
    skipped: dict[str, str]
    adapter_dtype: torch.dtype | None

    def report(self, model: nn.Module, adapter: str) -> InjectReport:
        parameters = list(model.parameters())
        return InjectReport(
            adapter,
            [(name, *features(layer), r) for name, (layer, r, _) in self.layers.items()],
            [(name, _size(getattr(m, "original_module", m))) for name, m in self.trained.items()],
            list(self.skipped.items()),
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters),
        )


def plan(
    model: nn.Module,
    config: LoRAConfig,
    adapter: str,
    adapter_dtype: torch.dtype | None = None,
    seconds: float | None = None,
) -> Plan:
    """Return what ``config`` means for ``model``, or raise; either way the model stays as it is.

    With ``seconds`` the config's patterns are not trusted: see `targets.select_within`.
    """
    _check_arguments(model, config, adapter)
    model = unwrapped(model)
    named = list(walk(model))
    modules = {name: module for name, module, _ in named}
    first_name = {id(module): name for name, module, _ in reversed(named)}
    blocked = _blocked(model, named)
    config = _with_task_head(config, modules)
    if config.target_modules is None:
        raise ValueError(f"target_modules is None; {_linear_names(named)}; or use 'all-linear'")
    spec, skipped = config.selection(), {}
    if config.all_linear:
        skipped = _not_for_all_linear(model, named, blocked)
        linear = {n: None for n, m, _ in named if _is_linear(m) and n not in skipped}
        spec["target_modules"] = list(linear)
    if seconds is None:
        choice = targets.select(spec, modules)
    else:
        choice = targets.select_within(spec, modules, seconds)

    excluded = {id(modules[name]) for name in choice["excluded"]}
    layers, trained = {}, {}
    for name, (r, alpha) in choice["layers"].items():
        module = modules[name]
        if id(module) in excluded or (config.all_linear and name not in linear):
            continue
        if (why := _unfit(module, blocked)) is not None:
            raise ValueError(f"target_modules selects {name!r}, which {why}")
        base = module.weight.dtype
        check_adapter_dtype(adapter_dtype or default_adapter_dtype(base), base)
        layers.setdefault(first_name[id(module)], (module, r, alpha))
    for name in choice["trained"]:
        trained[first_name[id(modules[name])]] = modules[name]
    _check_trained(trained, layers, blocked)
    if not layers:
        raise ValueError(_nothing_matched(config, choice, named))
    if config.modules_to_save and not trained:
        raise ValueError(
            f"modules_to_save={list(config.modules_to_save)!r:.300} names no module; "
            f"the model's modules are {_counted(Counter(map(_last, reversed(modules))))}"
        )

    under_trained = tuple(f"{name}." for name in trained)
    outside = [row for row in named if not f"{row[0]}.".startswith(under_trained)]
    for name, module, owner in outside:
        again = name != first_name[id(module)]
        if _is_linear(module) and owner is None and not again and name not in layers:
            why = "excluded" if id(module) in excluded else "not in target_modules"
            skipped.setdefault(name, why)
    biases = {
        "none": [],
        "lora_only": [row for row in outside if row[0] in layers],
        "all": [*outside, ("", model, None)],
    }[config.bias]
    if config.all_linear:
        short = _short_targets(layers, modules, excluded)
        config = dataclasses.replace(config, target_modules=short)
    conv1d = any(getattr(m, "fan_in_fan_out", is_conv1d(m)) for m, *_ in layers.values())
    config = dataclasses.replace(config, fan_in_fan_out=conv1d)
    return Plan(config, layers, trained, _bias_owners(biases, layers), skipped, adapter_dtype)


def apply(
    model: nn.Module,
    made: Plan,
    adapter: str,
    tensors: dict[str, Tensor] | None = None,
    trainable: bool = True,
) -> None:
    """Carry out a plan: all that can fail is done on modules that are not in the model yet.

    ``tensors`` are the values to start from, by the keys of `model.tensors_of`.
    """
    grads = [(p, p.requires_grad) for p in model.parameters()]
    new: dict[int, nn.Module] = {}
    grown: list[LoRALinear | TrainableModule] = []
    config = made.config
    try:
        with disable_adapters(model) if adapter_names(model) else nullcontext():  # their biases too
            for module, r, alpha in made.layers.values():
                layer = module
                if not isinstance(module, LoRALinear):
                    layer = new[id(module)] = LoRALinear._around(module)
                layer.add_adapter(
                    adapter,
                    r=r,
                    lora_alpha=alpha,
                    lora_dropout=config.lora_dropout,
                    use_rslora=config.use_rslora,
                    init_lora_weights=config.init_lora_weights,
                    adapter_dtype=made.adapter_dtype,
                )
                grown.append(layer)
            for module in made.trained.values():
                wrapper = module
                if not isinstance(module, TrainableModule):
                    wrapper = new[id(module)] = TrainableModule(module)
                wrapper.add_adapter(adapter)
                grown.append(wrapper)
            aside = {key: owner.bias.detach().clone() for key, owner in made.biases.items()}
            if tensors is not None:
                _fill(made, new, adapter, tensors)
    except BaseException:
        for module in grown:
            module.delete_adapter(adapter)
        for parameter, required in grads:
            parameter.requires_grad_(required)
        raise
    if not records(model):
        model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    model._fastlora = records(model) | {adapter: Record(config, made.biases, aside)}
    for _, record in all_records(model):
        for key, owner in record.owners.items():
            if isinstance(new.get(id(owner)), LoRALinear):
                record.owners[key] = new[id(owner)]
    _keep_off_fast_path(model)
    set_adapter(model, adapter)
    if not trainable:
        for parameter in parameters_of(model, adapter):
            parameter.requires_grad_(False)


@torch.no_grad()
def _fill(made: Plan, new: dict[int, nn.Module], adapter: str, tensors: dict[str, Tensor]) -> None:
    for name, (module, _, _) in made.layers.items():
        layer = new.get(id(module), module)
        layer.lora_A[adapter].copy_(tensors[f"{name}.lora_A.weight"])
        layer.lora_B[adapter].copy_(tensors[f"{name}.lora_B.weight"])
    for name, module in made.trained.items():
        copied = new.get(id(module), module).modules_to_save[adapter]
        for key, tensor in copied.state_dict().items():
            tensor.copy_(tensors[f"{name}.{key}"])
    biases = [(owner.bias, tensors[key]) for key, owner in made.biases.items()]
    for bias, value in [(bias, value.to(bias)) for bias, value in biases]:
        bias.data = value


def _keep_off_fast_path(model: nn.Module) -> None:
    """Have PyTorch's encoder call its layers: its inference kernel only reads their weights."""
    fast = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    for module in (m for m in model.modules() if isinstance(m, fast)):
        if any(isinstance(inner, LoRALinear) for inner in module.modules()):
            module.activation_relu_or_gelu = 0  # the layer's switch
            module.use_nested_tensor = False  # the encoder's


def _bias_owners(named: Iterable[tuple], layers: dict) -> dict[str, nn.Module]:
    """Return the modules of `walk`'s rows that have a bias, by its key in a checkpoint."""
    found, seen = {}, set()
    for name, module, _ in named:
        if isinstance(module, TrainableModule):  # another adapter's
            module = module.original_module
        if module._parameters.get("bias") is not None and id(module) not in seen:
            seen.add(id(module))
            part = "base_layer.bias" if name in layers else "bias"
            found[f"{name}.{part}".lstrip(".")] = module
    return found


# What cannot be, and what else can.


def _check_arguments(model: nn.Module, config: LoRAConfig, adapter: str) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model is in DistributedDataParallel: inject first, then wrap it")
    model = unwrapped(model)
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    check_adapter_name(adapter)
    if adapter in adapter_names(model):
        raise ValueError(f"adapter {adapter!r} exists already; delete_adapter() it first")
    if _is_linear(model):
        raise ValueError("model is one linear layer: LoRALinear.from_linear() takes it")
    for name, module in model.named_modules():
        if any(f"{k.__module__}.{k.__name__}" == _PEFT_LAYER for k in type(module).__mro__):
            raise ValueError(
                f"{name!r} is a layer of PEFT's already: patch_peft() fuses it as it is; inject() "
                "takes the model as it was before"
            )
    if is_merged(model):
        raise ValueError("the model is merged: unmerge() it before another adapter is added")
    others = [name for name, record in all_records(model) if record.config.bias != "none"]
    if config.bias != "none" and others:
        raise ValueError(
            f"bias={config.bias!r}, but adapter {others[0]!r} trains the model's biases already; "
            "only one adapter of a model can"
        )


def _blocked(model: nn.Module, named: list) -> dict[int, str]:
    """Return why modules cannot be replaced, for reasons that lie in the modules around them."""
    why = {
        id(m): f"is inside {owner!r}, which is trained in full" for _, m, owner in named if owner
    }
    for module in model.modules():
        if "_orig_mod" in module._modules:
            why[id(module._orig_mod)] = "is compiled by itself: inject first, then compile"
        if isinstance(module, TrainableModule):
            why[id(module)] = "another adapter trains in full"
    return why


def _unfit(module: nn.Module, blocked: dict[int, str]) -> str | None:
    if id(module) in blocked:
        return blocked[id(module)]
    return None if isinstance(module, LoRALinear) else unsupported(module)


def _not_for_all_linear(model: nn.Module, named: list, blocked: dict[int, str]) -> dict[str, str]:
    """Return why "all-linear" leaves a linear layer alone, by its name."""
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    linear = [(name, module) for name, module, _ in named if _is_linear(module)]
    why = {n: "the output head" if m is head else _unfit(m, blocked) for n, m in linear}
    return {name: reason for name, reason in why.items() if reason is not None}


def _with_task_head(config: LoRAConfig, modules: dict[str, nn.Module]) -> LoRAConfig:
    given = config.modules_to_save or ()
    heads = [h for h in _HEADS.get(config.task_type, ()) if h not in given]
    found = [head for head in heads if any(name.endswith(head) for name in modules)]
    return dataclasses.replace(config, modules_to_save=(*given, *found)) if found else config


def _check_trained(trained: dict, layers: dict, blocked: dict[int, str]) -> None:
    for name, module in trained.items():
        why = None
        below = [other for other in (*layers, *trained) if other.startswith(f"{name}.")]
        if isinstance(module, _NEVER_CALLED):
            why = f"is a {type(module).__name__}, which is never called"
        elif name in layers or below:
            why = f"cannot be trained in full while {(below or [name])[0]!r} is selected too"
        elif isinstance(module, TrainableModule):
            continue
        elif id(module) in blocked:
            why = blocked[id(module)]
        elif any(isinstance(m, (LoRALinear, TrainableModule)) for m in module.modules()):
            why = "has adapters already"
        elif any(type(m).get_extra_state is not _NO_STATE for m in module.modules()):
            why = "has extra state, which no adapter file holds"
        if why is not None:
            raise ValueError(f"modules_to_save selects {name!r}, which {why}")


def _short_targets(layers: dict, modules: dict, excluded: set[int]) -> list[str] | str:
    """Return targets that select exactly ``layers``: the last parts of their names if those do."""
    last = sorted({_last(name) for name in layers})
    reached = {id(m) for name, m in modules.items() if _last(name) in last} - excluded
    if reached == {id(layer) for layer, *_ in layers.values()}:
        return last
    return "|".join(name.replace(".", r"\.") for name in layers)


def _nothing_matched(config: LoRAConfig, choice: dict, named: list) -> str:
    target = config.target_modules
    why = [f"target_modules={target if isinstance(target, str) else list(target)!r:.300}"]
    if config.layers_to_transform is not None:
        why.append(f"with layers_to_transform={config.layers_to_transform!s:.100}")
    if count := len(choice["excluded"]):
        why.append(f"where exclude_modules and modules_to_save keep {count} modules out")
    return f"{' '.join(why)} selects nothing; {_linear_names(named)}"


def _linear_names(named: list) -> str:
    linear = {id(module): _last(name) for name, module, _ in named if _is_linear(module)}
    return f"the model's linear layers are {_counted(Counter(linear.values())) or 'none'}"


def _counted(names: Counter) -> str:
    first = [f"{name} x{n}" if n > 1 else name for name, n in list(names.items())[:20]]
    return ", ".join(first) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features(module: nn.Module) -> Sequence[int]:
    """Return (in_features, out_features) of a linear layer or a Conv1D."""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _last(name: str) -> str:
    return name.rpartition(".")[2]
