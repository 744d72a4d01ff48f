# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora ranks``: doubles the rank until held-out loss levels off, then adapts more.

Every trial has the same alpha. Adam moves an entry of B by about the learning rate, whatever its
gradient, so at first B A moves by about r · scaling: with scaling = alpha / r that is the same at
every rank, and one learning rate serves them all (arXiv:2106.09685, section 4.1). Were alpha 2 r, a
larger rank would also take larger steps, and the search would compare learning rates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import nn

from fastlora.commands import finetune, models
from fastlora.commands.models import Targets
from fastlora.commands.rank_search import Trial, listed, reason, search, table, taken
from fastlora.commands.shared import UserError, check, option, rank, say, write_json

# Where a search starts: query and value as in arXiv:2106.09685, or the one layer that makes them
# (Phi-3 and CodeGen; GPT-NeoX, Falcon and Bloom; MPT; GPT-2).
STARTS = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("Wqkv",), ("c_attn",))
# What else attention projects with. GPT-2 calls a layer of its MLP c_proj, too.
OTHERS = ("k_proj", "o_proj", "out_proj", "dense", "attn.c_proj")
_GAIN = "of held-out loss that twice the rank, or more layers, must take off; 0.01 is 1%%"
_SEEDS = "each trial is trained once for each; with several, what a seed changes is no gain"
_START = "layers to start with; without it the query and value projections of attention"


@dataclass(frozen=True)
class RankSettings(finetune.Settings):
    """What a search is made of: what all its trials have, and no option for what they don't."""

    output: str = option("out/ranks", "folder for the trials, the table and the picture")
    r: int = 1
    target_modules: str | tuple[str, ...] = option((), _START, metavar="NAME")
    seed: int = 0
    ask: str | None = None
    max_r: int = option(64, "ranks are 1, 2, 4, ... up to this one")
    gain: float = option(0.01, _GAIN, metavar="FRACTION")
    seeds: Sequence[int] = option((0,), _SEEDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "max_r", self.max_r >= 2, "at least 2, to compare two ranks")
        check(self, "gain", 0 < self.gain < 1, "above 0 and below 1 (0.01 is 1%)")
        check(self, "seeds", len(set(self.seeds)) == len(self.seeds), "different ones")


def run(s: RankSettings) -> dict:
    """Search, print the table and the choice, and return what ranks.json holds.

    Each trial is a run of `finetune`, in its own folder of ``s.output``: what was finished before
    is not trained again. ranks.json and ranks.png are written beside them. Raises UserError for
    what the user can put right.
    """
    sets = target_sets(s.model, s.target_modules)
    say("search", f"r = 1, 2, 4, ... at most {s.max_r}, on {listed(sets[0])}")
    wider = "; ".join(f"on {listed(targets)}" for targets in sets[1:])
    say("then", f"the rank taken, {wider}" if wider else "nothing: no set known here is wider")
    trials = search(lambda r, targets: _train(s, r, targets), s.max_r, sets, s.gain)
    best = taken(trials)
    take = {"r": best.r, "target_modules": best.targets}
    rows = [vars(t) | {"gains": t.gains, "over": t.over and t.over.r} for t in trials]
    found = {"take": take, "why": reason(trials, s.gain, s.max_r), "trials": rows}
    found["settings"] = dataclasses.asdict(s)
    if rank() == 0:
        _show(found, trials, s)
    return found


def target_sets(name: str, start: Targets) -> list[Targets]:
    """Return ``start`` and what is wider, by the names in the model's config: no weight is loaded.

    Wider are every attention projection and "all-linear"; one that does not hold all modules of
    the set before it, and more, is left out. Without ``start`` it is the first of `STARTS` that the
    model has. Raises UserError.
    """
    model = models.empty_model(name)
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]

    def has(part: str) -> bool:
        return any(f".{module}".endswith(f".{part}") for module in linear)

    known = next((names for names in STARTS if all(map(has, names))), ())
    if not start and not known:
        last = ", ".join(sorted({module.rpartition(".")[2] for module in linear}))
        raise UserError(f"--target-modules must say where to start: this model has {last}")
    sets = [start or known]
    adapted = _modules(model, sets[0])
    attention = [known + tuple(filter(has, OTHERS))] if known else []
    for targets in (*attention, "all-linear"):
        with contextlib.suppress(UserError):  # PEFT refuses all linear layers of a Mamba
            if (more := _modules(model, targets)) > adapted:
                sets, adapted = [*sets, targets], more
    return sets


def _modules(model: nn.Module, targets: Targets) -> set[str]:
    tuner = models.adapted(model, targets).base_model
    names = set(tuner.targeted_module_names)
    tuner.unload()
    return names


def _train(s: RankSettings, r: int, targets: Targets) -> Trial:
    """Run `finetune` once for each seed, or read what it left when it was run before."""
    same = {f.name: getattr(s, f.name) for f in dataclasses.fields(finetune.Settings)}
    runs = []
    for seed in s.seeds:
        folder = f"r{r}-{re.sub('[^a-zA-Z0-9_.-]+', ',', listed(targets))[:60]}-seed{seed}"
        own = {"r": r, "target_modules": targets, "seed": seed, "output": f"{s.output}/{folder}"}
        say("trial", f"{listed(targets, r)}, seed {seed}")
        runs.append(finetune.run(finetune.Settings(**same | own)))
        gc.collect()  # a model is a cycle of references, and the next one needs its memory
    losses = tuple(run["held_out_after"] for run in runs)
    before = fmean(run["held_out_before"] for run in runs)
    seconds = round(sum(run["seconds"] for run in runs), 2)
    return Trial(r, targets, losses, before, runs[0]["trainable"], seconds)


def _show(found: dict, trials: list[Trial], s: RankSettings) -> None:
    """Write ranks.json and ranks.png, and print the table and the choice."""
    from fastlora.commands import pictures

    picture, numbers = Path(s.output, "ranks.png"), Path(s.output, "ranks.json")
    write_json(numbers, found)
    seeds = ", ".join(map(str, s.seeds))
    title = f"{models.title(s.model)}: held-out loss by rank"
    each = f"{s.steps} steps, lr {s.lr:g}, {s.batch_size} examples a step"
    how = f"{each}, alpha {s.alpha:g} at every rank, mean of seeds {seeds}"
    pictures.rank_curve(picture, trials, taken(trials), title, how)
    print(f"\n{table(trials)}\n")
    say("gain", "how much lower the loss is than that of the last trial above that was worth it")
    noisy = f"± is the standard deviation over seeds {seeds}; a gain within it is none"
    alone = "one seed: how far another moves a gain is unknown; --seeds 0 1 2 measures it"
    say("noise", noisy if len(s.seeds) > 1 else alone)
    say("wrote", f"{picture}, {numbers}")
    print(found["why"])
