# SPDX-License-Identifier: Apache-2.0
"""Which adapter each row of a layer's input is for, where the samples of a batch differ in it."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Adapters by name, None for the base alone, with the rows that they are for.
Runs = Sequence[tuple["str | None", slice]]


class Block:
    """What each fused layer of a model reads while `adapters_by_sample` lasts."""

    def __init__(self, names: Sequence[str | None], lengths: Sequence[int] | None) -> None:
        self.names, self.lengths, self.ended, self.checkpointed = names, lengths, False, False
        self.inside = 0  # of a checkpoint that finds the block itself
        self._runs: dict[torch.Size, Runs] = {}

    @contextlib.contextmanager
    def within(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Have layers read this block inside, whatever they read outside."""
        before = [layer._by_sample for layer in layers]
        self.inside += 1
        try:
            for layer in layers:
                layer._by_sample = self
            yield
        finally:
            self.inside -= 1
            for layer, block in zip(layers, before, strict=True):
                layer._by_sample = block

    def runs(self, x: Tensor) -> Runs:
        """Return the runs of rows of x [..., K], all leading dimensions flattened."""
        if self.ended and not self.inside:
            why = "backward has to be inside of its block too"
            raise RuntimeError(f"a checkpoint runs again after adapters_by_sample(): {why}")
        # Outside of a checkpoint there are no such hooks, and training has gradients.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        kept = hooks is not None or not torch.is_grad_enabled()
        self.checkpointed |= kept and not self.inside
        found = self._runs.get(x.shape[:-1])
        if found is None:
            found = self._runs[x.shape[:-1]] = runs_of(self.names, self._sizes(x))
        return found

    def _sizes(self, x: Tensor) -> Sequence[int]:
        lead = x.shape[:-1] or (1,)
        count, rows = len(self.names), math.prod(lead)
        if self.lengths is not None:
            if sum(self.lengths) != rows:
                raise ValueError(
                    f"adapters_by_sample() was given lengths of {sum(self.lengths)} tokens in all, "
                    f"and a layer gets {rows} in {tuple(x.shape)}"
                )
            return self.lengths
        # Those of a sample's beams are together.
        beams = lead[0] % count == 0 and len(lead) > 1 and not torch.is_grad_enabled()
        if lead[0] == count or beams:
            return [rows // count] * count
        raise ValueError(
            f"adapters_by_sample() was given {count} names, and a layer gets {tuple(x.shape)}, "
            "whose first dimension is not that of the samples; lengths= of tokens may be given"
        )


def runs_of(names: Sequence[str | None], sizes: Sequence[int]) -> Runs:
    """Return names with their rows, those of neighbours of one name together."""
    found, end = [], 0
    for name, group in itertools.groupby(zip(names, sizes, strict=True), lambda pair: pair[0]):
        start, end = end, end + sum(size for _, size in group)
        found.append((name, slice(start, end)))
    return found
