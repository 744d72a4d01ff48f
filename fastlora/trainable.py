# SPDX-License-Identifier: Apache-2.0
"""`TrainableModule`: a module trained in full, one copy per adapter (``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class TrainableModule(nn.Module):
    """Runs the active adapter's copy of ``module``; the frozen original when there is none.

    Attributes that are not its own are those of the module that would run. State-dict keys:
    ``original_module.*`` and ``modules_to_save.<adapter>.*``, PEFT's names.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = module.training
        self.active_adapter: str | None = None
        self.disable_adapters = False
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def add_adapter(self, name: str) -> None:
        """Copy the original for adapter ``name``, frozen and not yet active."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def set_adapter(self, name: str | None) -> None:
        """Run and train the copy of ``name``, or run the original with None."""
        self.active_adapter = name
        for other, module in self.modules_to_save.items():
            module.requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Drop the copy of ``name``; the original runs where it was active."""
        if self.active_adapter == name:
            self.active_adapter = None
        del self.modules_to_save[name]

    def current(self) -> nn.Module:
        """Return the module that runs."""
        if self.disable_adapters or self.active_adapter is None:
            return self.original_module
        return self.modules_to_save[self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While it is built or unpickled there is nothing to fall through to.
            if "modules_to_save" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.current(), name)
