# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora ranks``: doubles the rank until held-out loss levels off, then adapts more.

Every trial has the same alpha. Adam moves an entry of B by about the learning rate, whatever its
gradient, so at first B A moves by about r · scaling: with scaling = alpha / r that is the same at
every rank, and one learning rate serves them all (arXiv:2106.09685, section 4.1). Were alpha 2 r, a
larger rank would also take larger steps, and the search would compare learning rates.
"""

from __future__ import annotations

import contextlib
import gc
import re
import zlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from torch import nn

from fastlora.commands import finetune, models
from fastlora.commands.shared import UserError, rank, say, write_json

# Where a search starts: query and value as in arXiv:2106.09685, or the one layer that makes them
# (Phi-3 and CodeGen; GPT-NeoX, Falcon and Bloom; MPT; GPT-2).
STARTS = (["q_proj", "v_proj"], ["qkv_proj"], ["query_key_value"], ["Wqkv"], ["c_attn"])
_GAIN = "of held-out loss that twice the rank, or more layers, must take off; 0.01 is 1%%"
_SEEDS = "each trial is trained once for each; with several, what a seed changes is no gain"
_START = "layers to start with; without it the query and value projections of attention"


def add_options(add: Callable) -> None:
    finetune.add_common_options(add)
    add("--output", default="out/ranks", help="folder for the trials, the table and the picture")
    add("--target-modules", nargs="+", default=[], metavar="NAME", help=_START)
    add("--max-r", type=finetune.POSITIVE, default=64, help="ranks are 1, 2, 4, ... up to this one")
    add("--gain", type=finetune.FRACTION, default=0.01, metavar="FRACTION", help=_GAIN)
    add("--seeds", nargs="+", type=int, default=[0], help=_SEEDS)


@dataclass
class Trial:
    """A rank on some targets, what its training came to, and what that gains.

    ``losses``: held out, in nats per token, one for each seed; ``before``: their mean without any
    training; ``gain``: by which part the loss is lower than that of the trial taken until then, in
    the mean of seeds that differ by ``noise``; ``why``: what came of it.
    """

    r: int
    targets: list[str]
    losses: list[float]
    before: float
    trainable: int
    seconds: float
    gain: float = 0.0
    noise: float = 0.0
    why: str = ""

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    def __str__(self) -> str:
        return f"r = {self.r} on {', '.join(self.targets)}"

    def better(self, best: Trial, wanted: float) -> Trial:
        """Return it or ``best``, compared seed by seed: a seed decides what is held out, too."""
        gains = [1 - new / old for new, old in zip(self.losses, best.losses, strict=True)]
        self.gain, self.noise = fmean(gains), stdev(gains) if len(gains) > 1 else 0.0
        self.why = f"{self} gains {self.gain:.2%} over {best}"
        if self.gain >= wanted and self.gain > self.noise:
            return self
        if self.gain < wanted:
            self.why += f", under the {wanted:.2%} asked for"
        else:
            self.why += f", no more than seeds differ by ({self.noise:.2%})"
        return best


def run(s: Namespace) -> dict:
    """Search, print the table and the choice, and return what ranks.json holds.

    Each trial is a run of `finetune`, in its own folder of ``s.output``: what was finished before
    is not trained again. ranks.json and ranks.png are written beside them. Raises UserError for
    what the user can put right.
    """
    if len({*s.seeds}) < len(s.seeds):
        raise UserError(f"--seeds must be different ones, got {s.seeds}")
    sets = target_sets(s.model, s.target_modules)
    say("search", f"r = 1, 2, 4, ... at most {s.max_r}, on {'; then '.join(map(', '.join, sets))}")
    trials, best, why = search(lambda *trial: _train(s, *trial), s.max_r, sets, s.gain)
    found = {"take": {"r": best.r, "target_modules": best.targets}, "why": why}
    found |= {"trials": [vars(trial) for trial in trials], "settings": vars(s)}
    if rank() == 0:
        from fastlora.commands.pictures import rank_curve

        picture, numbers = Path(s.output, "ranks.png"), Path(s.output, "ranks.json")
        write_json(numbers, found)
        how = f"{s.steps} steps, lr {s.lr:g}, {s.batch_size} examples a step, alpha {s.alpha:g}"
        rank_curve(picture, trials, best, f"{Path(s.model).name}: held-out loss by rank", how)
        print(f"\n{table(trials, best)}\n")
        say(
            "gain", "how much lower the loss is than that of the last trial above that was worth it"
        )
        noisy = "± is the standard deviation over seeds; a gain within it is none"
        alone = "one seed: how far another moves a gain is unknown; --seeds 0 1 2 measures it"
        say("noise", noisy if len(s.seeds) > 1 else alone)
        say("wrote", f"{picture}, {numbers}")
        print(why)
    return found


def search(
    train: Callable[[int, list[str]], Trial], max_r: int, sets: Sequence[list[str]], wanted: float
) -> tuple[list[Trial], Trial, str]:
    """Return every trial of the search, the one to take, and what to take and why.

    Ranks 1, 2, 4, ... up to ``max_r`` on the first of ``sets`` until a doubling is not worth it;
    then, at the rank taken, each of the wider sets.
    """
    best = train(1, sets[0])
    trials = [best]
    while trials[-1] is best and 2 * best.r <= max_r:
        trials.append(train(2 * best.r, sets[0]))
        best = trials[-1].better(best, wanted)
    reasons = [trials[-1].why] + [f"--max-r {max_r} ends there"] * (trials[-1] is best)
    for targets in sets[1:]:
        trials.append(train(best.r, targets))
        best = trials[-1].better(best, wanted)
        reasons.append(trials[-1].why)
    if best.loss >= best.before:
        reasons.append(f"but untrained the model is no worse ({best.before:.3f}): lower --lr")
    return trials, best, f"take {best}: {'; '.join(filter(None, reasons))}"


def table(trials: list[Trial], best: Trial) -> str:
    """Return a line for the untrained model and for each trial, under headings."""
    rows = [("r", "trainable", "held-out loss", "gain", "seconds", "", "targets")]
    rows.append(("", "0", f"{trials[0].before:.3f}", "", "", "", "untrained"))
    for t in trials:
        gain = (f"{t.gain:.2%}" + f" ± {t.noise:.2%}" * (len(t.losses) > 1)) * bool(t.why)
        numbers = (str(t.r), f"{t.trainable:,}", f"{t.loss:.3f}", gain, f"{t.seconds:.0f}")
        rows.append((*numbers, "taken" * (t is best), ", ".join(t.targets)))
    *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, [*widths, 0])) for row in rows)


def target_sets(name: str, start: list[str]) -> list[list[str]]:
    """Return ``start`` and what is wider, by the names in the model's config: no weight is loaded.

    Wider are all the linear layers beside those (of attention, where it starts there) and
    "all-linear"; one that does not hold all modules of the set before it, and more, is left out.
    Without ``start`` it is the first of `STARTS` that the model has. Raises UserError.
    """
    model = models.empty_model(name)
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    names = {path.rpartition(".")[2] for path in linear}
    start = start or next((known for known in STARTS if names.issuperset(known)), [])
    if not start:
        raise UserError(f"--target-modules must say where to start, of {', '.join(sorted(names))}")
    sets, adapted = [start], _modules(model, start)
    blocks = {path.rpartition(".")[0] for path in adapted}
    beside = (path.split(".")[-2:] for path in linear if path.rpartition(".")[0] in blocks)
    for targets in (list(dict.fromkeys(map(".".join, beside))), ["all-linear"]):
        with contextlib.suppress(UserError):  # PEFT refuses all linear layers of a Mamba
            if (more := _modules(model, targets)) > adapted:
                sets, adapted = [*sets, targets], more
    return sets


def _modules(model: nn.Module, targets: list[str]) -> set[str]:
    tuner = models.adapted(model, targets).base_model
    names = set(tuner.targeted_module_names)
    tuner.unload()
    return names


def _train(s: Namespace, r: int, targets: list[str]) -> Trial:
    """Run `finetune` once for each seed, or read what it left when it was run before."""
    own = ("max_r", "gain", "seeds")
    same, runs = {name: value for name, value in vars(s).items() if name not in own}, []
    for seed in s.seeds:
        name = f"r{r}-{re.sub('[^a-zA-Z0-9_.-]+', ',', ','.join(targets))[:60]}"
        name += f"-{zlib.crc32(repr(targets).encode()):08x}-seed{seed}"  # of what is cut, too
        trial = {"r": r, "target_modules": targets, "seed": seed, "ask": None}
        say("trial", name)
        runs.append(finetune.run(Namespace(**same | trial | {"output": f"{s.output}/{name}"})))
        gc.collect()  # a model is a cycle of references, and the next one needs its memory
    losses, before = ([one[f"held_out_{when}"] for one in runs] for when in ("after", "before"))
    seconds = round(sum(one["seconds"] for one in runs), 2)
    return Trial(r, targets, losses, fmean(before), runs[0]["trainable"], seconds)
