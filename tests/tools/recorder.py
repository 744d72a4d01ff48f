# SPDX-License-Identifier: Apache-2.0
"""Collects what the kernels' launchers would launch on a chip that need not be here."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

from fastlora_kernels import launch, replay
from fastlora_kernels.configs import Chip, Config


class Call(NamedTuple):
    """One launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    values: tuple[Any, ...]
    config: Config

    @property
    def args(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.values, strict=True))


@contextlib.contextmanager
def recording(chip: Chip, run: Callable[[Call], Any] | None = None) -> Iterator[list[Call]]:
    """Collect the launches made inside, as for ``chip``, and only ``run`` runs them."""
    calls: list[Call] = []
    run = run or calls.append

    def note(self: launch.Launch, *tensors: Any) -> None:
        if not self.empty:
            run(Call(self.kernel, self.grid, (*tensors, *self.rest), self.config))

    with (
        patch.object(replay, "RECORDS", False),
        patch.object(launch.Launch, "__call__", note),
        patch.object(Chip, "of", staticmethod(lambda device: chip)),
    ):
        yield calls
