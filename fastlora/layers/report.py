# SPDX-License-Identifier: Apache-2.0
"""`PatchReport`: which layers of a model run fused, which do not, and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

# The path of a module and its children's names.
Names = tuple[str, tuple[str, ...]]


@dataclass
class PatchReport:
    """What `patch_peft` or `replace_linears` did; ``print`` it.

    ``fused``: names of the layers that run the fused forward; ``not_fused``: (name, why) of the
    others that were asked for, which run as before. ``siblings``, ``gated_mlps``: (module,
    children's names) of what runs as one operator; ``lookalikes``: (class, why not) of what seemed
    a gated MLP.
    """

    fused: list[str]
    not_fused: list[tuple[str, str]]
    siblings: list[Names] = field(default_factory=list)
    gated_mlps: list[Names] = field(default_factory=list)
    lookalikes: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.not_fused)} LoRA layers fused"]
        if self.fused:
            lines.append(f"  fused: {counted(self.fused)}")
        for what, found in ("siblings", self.siblings), ("gated MLP", self.gated_mlps):
            together = Counter(", ".join(names) for _, names in found)
            lines += [f"  {what}: {_times(*item)}" for item in together.items()]
        lines += [f"  not as one operator: {kind} ({why})" for kind, why in self.lookalikes]
        reasons = defaultdict(list)
        for name, why in self.not_fused:
            reasons[why].append(name)
        lines += [f"  not fused, {why}: {counted(names)}" for why, names in reasons.items()]
        return "\n".join(lines)


def counted(names: Iterable[str]) -> str:
    """Return the last parts of names, and how often each comes."""
    last = Counter(name.rpartition(".")[2] for name in names)
    more = f" and {len(last) - 8} more" if len(last) > 8 else ""
    return ", ".join(_times(*item) for item in last.most_common(8)) + more


def _times(text: str, n: int) -> str:
    return f"{text} x{n}" if n > 1 else text
