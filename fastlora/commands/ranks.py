# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora ranks``: doubles the rank until held-out loss levels off, then adapts more.

Every trial has the same alpha. Adam moves an entry of B by about the learning rate, whatever its
gradient, so at first B A moves by about r · scaling: with scaling = alpha / r that is the same at
every rank, and one learning rate serves them all (arXiv:2106.09685, section 4.1). Were alpha 2 r, a
larger rank would also take larger steps, and the search would compare learning rates.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from fastlora.commands import finetune
from fastlora.commands.finetune import Settings, say
from fastlora.commands.finetune_data import UserError
from fastlora.commands.finetune_model import gguf_file
from fastlora.commands.processes import rank
from fastlora.commands.rank_search import Step, Trial, reason, search, table, taken
from fastlora.commands.target_sets import Targets, listed, target_sets
from fastlora.files import replace_file


def run(
    settings: Settings, start: Targets | None, max_r: int, gain: float, seeds: Sequence[int]
) -> dict:
    """Search, print the table and the choice, and return what ranks.json holds.

    Each trial is a run of `finetune` with ``settings``, but for rank, targets and seed, in its own
    folder of ``settings.output``: what was finished before is not trained again. ranks.json and
    ranks.png are written beside them. ``start``: the first targets, None for those that
    `target_sets` finds. Raises UserError for what the user can put right.
    """
    if max_r < 2:
        raise UserError(f"--max-r must be at least 2, to compare two ranks, got {max_r}")
    if not 0 < gain < 1:
        raise UserError(f"--gain must be above 0 and below 1 (0.01 is 1%), got {gain:g}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must differ, got {' '.join(map(str, seeds))}")
    sets = target_sets(settings.model, start)
    say("search", f"r = 1, 2, 4, ... at most {max_r}, on {listed(sets[0])}")
    wider = "; ".join(f"on {listed(targets)}" for targets in sets[1:])
    say("then", f"the rank taken, {wider}" if wider else "nothing: no set known here is wider")

    def train(r: int, targets: Targets) -> Trial:
        return _train(dataclasses.replace(settings, r=r, target_modules=targets), seeds)

    steps = search(train, max_r, sets, gain)
    found = {
        "take": {"r": taken(steps).trial.r, "target_modules": taken(steps).trial.targets},
        "why": reason(steps, gain, max_r),
        "max_r": max_r,
        "gain_asked": gain,
        "seeds": list(seeds),
        "settings": _same_in_all(settings),
        "trials": [_row(step) for step in steps],
    }
    if rank() == 0:
        _show(found, steps, settings)
    return found


def _train(settings: Settings, seeds: Sequence[int]) -> Trial:
    """Run `finetune` once for each seed, or read what it left when it was run before."""
    runs = []
    for seed in seeds:
        one = dataclasses.replace(settings, seed=seed, output=str(_folder(settings, seed)))
        say("trial", f"r = {one.r} on {listed(one.target_modules)}, seed {seed}")
        runs.append(finetune.run(one))
        gc.collect()  # a model is a cycle of references, and the next one needs its memory
    return Trial(
        settings.r,
        settings.target_modules,
        tuple(run["held_out_after"] for run in runs),
        fmean(run["held_out_before"] for run in runs),
        runs[0]["trainable"],
        round(sum(run["seconds"] for run in runs), 2),
    )


def _folder(settings: Settings, seed: int) -> Path:
    targets = re.sub(r"[^\w.-]+", ",", listed(settings.target_modules))[:60]
    return Path(settings.output) / f"r{settings.r}-{targets}-seed{seed}"


def _same_in_all(settings: Settings) -> dict:
    own = ("r", "target_modules", "seed", "ask", "output", "save_every", "restart")
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in own}


def _row(step: Step) -> dict:
    own = {"gain": step.gain, "noise": step.noise, "worth": step.worth}
    return dataclasses.asdict(step.trial) | own


def _show(found: dict, steps: list[Step], settings: Settings) -> None:
    """Write ranks.json and ranks.png, and print the table and the choice."""
    from fastlora.commands import rank_curve

    s, gguf, seeds = settings, gguf_file(settings.model), found["seeds"]
    picture, numbers = (Path(s.output) / name for name in ("ranks.png", "ranks.json"))
    text = json.dumps(found, indent=1, ensure_ascii=False)
    replace_file(numbers, lambda file: file.write(text.encode()))
    rank_curve.draw(
        picture,
        [step.trial for step in steps],
        taken(steps).trial,
        title=f"{gguf.stem if gguf else Path(s.model).name}: held-out loss by rank",
        subtitle=f"{s.steps} steps, lr {s.lr:g}, {s.batch_size} examples a step, alpha {s.alpha:g} "
        f"at every rank, {f'mean of {len(seeds)} seeds' if len(seeds) > 1 else f'seed {seeds[0]}'}",
    )
    print(f"\n{table(steps)}\n")
    say("gain", "how much lower the loss is than that of the last trial above that was worth it")
    if len(seeds) == 1:
        say("noise", "one seed: how far another moves a gain is unknown; --seeds 0 1 2 measures it")
    else:
        say("noise", f"± is a standard deviation over {len(seeds)} seeds; a gain within it is none")
    say("wrote", f"{picture}, {numbers}")
    print(found["why"])
