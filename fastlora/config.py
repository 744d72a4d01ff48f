# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: an adapter's settings under PEFT's names, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch

from fastlora import targets
from fastlora.layers.hyperparameters import check_hyperparameters

TASK_TYPES = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)

# Keys of an adapter_config.json that change nothing here, whatever they hold: they describe the
# file, or matter only beside another key that is refused.
_INERT = frozenset(
    {
        "auto_mapping",
        "inference_mode",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)


@dataclass(frozen=True)
class LoRAConfig:
    """One adapter's settings; fields, defaults and meaning are those of PEFT's ``LoraConfig``.

    ``target_modules``: names or last parts of names (list, set), a regular expression for whole
    names (str), or "all-linear": every linear layer but the output head. ``exclude_modules``
    likewise. ``layers_to_transform`` (indices) and ``layers_pattern`` (what the indexed list is
    called) narrow a list of targets. ``rank_pattern`` and ``alpha_pattern`` map a name's end, as
    a regular expression, to that layer's r or lora_alpha.
    ``bias``: which biases train too: "none", "lora_only" (of the adapted layers) or "all".
    ``modules_to_save``: modules trained in full, in a copy per adapter. A ``task_type`` of
    "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" adds the model's new head to them.
    ``fan_in_fan_out`` is read off each layer; the value given is not used.
    Raises TypeError or ValueError that names the field.
    """

    r: int = 8
    target_modules: str | Collection[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    exclude_modules: str | Collection[str] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: Collection[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> LoRAConfig:
        refused = sorted(kwargs.keys() - {f.name for f in dataclasses.fields(cls)})
        if refused:
            raise TypeError(f"{_unsupported(refused)}; {_supported()}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._normalise()
        for pattern in ("rank_pattern", "alpha_pattern"):
            self._check_pattern(pattern)
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        if self.lora_dropout == 1:
            raise ValueError("lora_dropout must be at least 0 and less than 1, got 1")
        for r in self.rank_pattern.values():
            check_hyperparameters(r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        for name in ("use_rslora", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _check_choice("bias", self.bias, ("none", "all", "lora_only"))
        if self.task_type is not None:
            _check_choice("task_type", self.task_type, TASK_TYPES)
        if not isinstance(self.base_model_name_or_path, (str, type(None))):
            raise TypeError(
                "base_model_name_or_path must be a str or None, got "
                f"{self.base_model_name_or_path!r:.100}"
            )
        self._check_layers()

    def _normalise(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            self._set(name, _names(name, getattr(self, name), or_str=True))
        self._set("modules_to_save", _names("modules_to_save", self.modules_to_save))
        if self.target_modules is not None and not self.target_modules:
            raise ValueError('target_modules must name a module, or be "all-linear"; it is empty')
        task_type = getattr(self.task_type, "value", self.task_type)  # PEFT's enum
        self._set("task_type", task_type)

    def _check_pattern(self, name: str) -> None:
        pattern = getattr(self, name)
        pattern = {} if pattern is None else pattern
        if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
            raise TypeError(
                f"{name} must be a dict with module names as keys, got {pattern!r:.200}"
            )
        self._set(name, dict(pattern))
        kind, what = (int, "an int") if name == "rank_pattern" else (Real, "a number")
        for key, value in pattern.items():
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name}[{key!r:.100}] must be {what}, got {value!r:.100}")
            if name == "rank_pattern" and value < 1:
                raise ValueError(f"{name}[{key!r:.100}] must be at least 1, got {value}")
            if name == "alpha_pattern" and not abs(value) <= torch.finfo(torch.float32).max:
                raise ValueError(
                    f"{name}[{key!r:.100}] must be finite in float32, got {value!s:.40}"
                )

    def _check_layers(self) -> None:
        indices = self.layers_to_transform
        if indices is not None:
            if isinstance(indices, (list, tuple, set, range)):
                indices = tuple(indices)
            for index in indices if isinstance(indices, tuple) else (indices,):
                if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                    raise TypeError(
                        "layers_to_transform must be a layer index (0, 1, ...) or a list of "
                        f"them, got {self.layers_to_transform!r:.100}"
                    )
            self._set("layers_to_transform", indices)
        if self.layers_pattern and indices is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")
        if isinstance(self.target_modules, str) and indices is not None:
            raise ValueError(
                "layers_to_transform works with a list of target_modules, "
                f"not with the str {self.target_modules!r:.200}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is the shorthand for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def selection(self) -> dict[str, Any]:
        """Return what `fastlora.targets.select` reads, as plain JSON values."""
        return {name: _plain(getattr(self, name)) for name in targets.FIELDS}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRAConfig:
        """Return the config of an adapter_config.json's values.

        Keys that are unknown here may hold None, False or nothing; with any other value they
        would change the adapter, and ValueError names them. ``peft_type`` must be "LORA".
        """
        if not isinstance(values, dict):
            raise TypeError(f"an adapter config must be a dict, got {type(values).__name__}")
        if values.get("peft_type") != "LORA":
            raise ValueError(f"peft_type must be 'LORA', got {values.get('peft_type')!r:.100}")
        own = {f.name for f in dataclasses.fields(cls)}
        refused = sorted(
            f"{key if key.isidentifier() else repr(key)!s:.60}={value!r:.40}"
            for key, value in values.items()
            if key not in own and key not in _INERT and not _neutral(value)
        )
        if refused:
            raise ValueError(f"{_unsupported(refused)}; {_supported()}")
        return cls(**{key: value for key, value in values.items() if key in own})

    def to_dict(self) -> dict[str, Any]:
        """Return the values of an adapter_config.json, which `from_dict` and PEFT read."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**values, "peft_type": "LORA", "inference_mode": True}


def _names(name: str, value: Any, or_str: bool = False) -> str | tuple[str, ...] | None:
    if value is None or (or_str and isinstance(value, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        if all(isinstance(entry, str) and entry for entry in value):
            return tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
        raise TypeError(f"{name} must hold non-empty names, got {value!r:.200}")
    kinds = "a list of module names" + (" or a regular expression" if or_str else "")
    raise TypeError(f"{name} must be {kinds}, got {value!r:.200}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r:.100}"
        )


def _neutral(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unsupported(names: list[str]) -> str:
    return f"LoRAConfig does not support {', '.join(names):.500}"


def _supported() -> str:
    return "it supports " + ", ".join(f.name for f in dataclasses.fields(LoRAConfig))
