# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora finetune``: LoRA on a causal language model, by PEFT and TRL's trainer."""

import contextlib
import hashlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastlora.commands import data, shared
from fastlora.commands.shared import UserError, is_sharded, number, rank, say

WARMUP = 0.05  # of all steps
POSITIVE, FRACTION = number(int, 1), number(float, 0, 1, above=True)
_LINES = 'JSONL: "prompt" and "response", "messages", or "text" on each line'
_TARGETS = "layer names, one regular expression, or all-linear"


def add_options(add: Callable) -> None:
    add_common_options(add)
    add("--output", default="out/finetune", help="folder for the adapter, curve and metrics")
    add("--ask", help="a question to answer before and after")
    add("--r", type=POSITIVE, default=16, help="rank")
    add("--target-modules", **shared.TARGETS, help=_TARGETS)
    add("--seed", type=int, default=0, help="decides order, split, start and dropout")


def add_common_options(add: Callable) -> None:
    """Add what a search for the rank takes, too."""
    add("--model", required=True, help="Hugging Face folder or id, or a folder with one .gguf")
    add("--data", required=True, help=_LINES)
    add("--alpha", type=float, default=32.0, help="scaling is alpha / r")
    add("--dropout", type=number(float, 0, 1), default=0.05, help="on the adapters' input")
    add("--steps", type=POSITIVE, default=200, help="optimizer steps")
    add("--batch-size", type=POSITIVE, default=8, help="examples a step")
    add("--seq-len", type=number(int, 2), default=512, help="tokens kept of each example")
    add("--lr", type=shared.ABOVE_0, default=5e-4, help="peak learning rate")
    add("--held-out", type=FRACTION, default=0.1, help="fraction never trained on")
    add("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the frozen model")
    for bits in (4, 8):
        add(f"--load-in-{bits}bit", action="store_true", help=f"of bitsandbytes, {bits} bits")
    add("--device", **shared.DEVICE)
    add("--save-every", type=POSITIVE, default=50, help="steps between checkpoints")
    add("--restart", action="store_true", help="begin again, whatever --output holds")


def run(s: Namespace) -> dict[str, Any]:
    """Train, or go on with a run that was cut short, and return what metrics.json holds.

    Writes under ``s.output``: adapter/ (PEFT's format), loss_curve.png and metrics.json; Trainer's
    checkpoints/ only until these are there. Raises UserError for what the user can put right.
    """
    if s.load_in_4bit and s.load_in_8bit:
        raise UserError("--load-in-4bit and --load-in-8bit exclude each other")
    examples = data.read_examples(s.data)
    config = _config(s)
    output, done = Path(s.output), Path(s.output, "metrics.json")
    own = fingerprint(s, config.device)
    with config.main_process_first(local=False):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output} cannot be made: {error.strerror}") from error
        if s.restart and rank() == 0:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            done.unlink(missing_ok=True)
    if done.exists():
        try:
            metrics = json.loads(done.read_text(encoding="utf-8"))
            _refuse_others(done, dict(metrics["settings"]), own)
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{done} is damaged; --restart begins again") from error
        say("finished", f"{output} holds this run already; --restart trains again")
        say("held out", f"{metrics['held_out_before']:.3f} -> {metrics['held_out_after']:.3f}")
        return metrics
    from fastlora.commands.pictures import loss_curve
    from fastlora.commands.trainer import train

    try:
        metrics = train(s, config, examples, own, *_last_checkpoint(output, own))
    except KeyboardInterrupt:
        kept, _ = _last_checkpoint(output, own)
        goes_on = f"{kept} is kept, and the same command goes on from there"
        say("stopped", goes_on if kept else "no checkpoint is written yet")
        raise
    if rank() == 0:
        how = f"r = {s.r}, dropout {s.dropout:g}, lr {s.lr:g}, {s.batch_size} examples a step"
        title = f"{Path(s.model).name}: LoRA fine-tuning"
        loss_curve(output / "loss_curve.png", metrics, title, how)
        shared.write_json(done, metrics)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        say("wrote", f"{output / 'loss_curve.png'}, {done}")
    return metrics


def _config(s: Namespace) -> Any:
    """Return TRL's configuration of a run, in one of its processes."""
    device, count = shared.torch_device(s.device), int(os.environ.get("WORLD_SIZE", "1"))
    cpu = device.type == "cpu"
    if s.batch_size % count:
        raise UserError(f"--batch-size must be a multiple of {count} processes, got {s.batch_size}")
    if device.index:
        raise UserError(f"--device {s.device}: choose by CUDA_VISIBLE_DEVICES, as Trainer does")
    wrong = is_sharded() and (cpu or os.environ.get("FSDP_VERSION") != "2")
    if wrong or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError("accelerate's configuration must be data-parallel, or FSDP2 on GPUs")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # --dtype says it
    from trl import SFTConfig

    sizes = {"per_device_train_batch_size": s.batch_size // count, "max_length": s.seq_len}
    sizes |= {"per_device_eval_batch_size": s.batch_size, "eval_on_start": True}
    steps = {"max_steps": s.steps, "learning_rate": s.lr, "seed": s.seed, "data_seed": s.seed}
    steps |= {"lr_scheduler_type": "cosine", "warmup_steps": round(WARMUP * s.steps)}
    saved = {"output_dir": f"{s.output}/checkpoints", "save_steps": s.save_every}
    saved |= {"save_total_limit": 1, "logging_steps": 1, "logging_nan_inf_filter": False}
    shown = {"disable_tqdm": False, "include_num_input_tokens_seen": "non_padding"}
    none = {"bf16": False, "gradient_checkpointing": False, "ddp_find_unused_parameters": False}
    # The loss is that of the answers alone.
    none |= {"report_to": "none", "router_aux_loss_coef": 0.0}
    # Left alone, Accelerate takes processes without a GPU for so many runs of one.
    where = {"use_cpu": cpu, "dataloader_pin_memory": not cpu}
    config = SFTConfig(**sizes, **steps, **saved, **shown, **none, **where)
    config._n_gpu = min(config.n_gpu, 1)  # one process uses one, however many it sees
    return config


def fingerprint(s: Namespace, device: torch.device) -> dict[str, Any]:
    """Return what a run that goes on must agree with: what decides the numbers, and a hash."""
    free = ("command", "output", "save_every", "restart")
    values = {name: value for name, value in vars(s).items() if name not in free}
    sha256 = hashlib.sha256(Path(s.data).read_bytes()).hexdigest()
    # Checkpoints of other devices, and sharded ones, differ too.
    return values | {"device": device.type, "sharded": is_sharded(), "data sha256": sha256}


def _refuse_others(where: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    names = [name for name in asked if there.get(name) != asked[name]]
    if names:
        changes = ", ".join(f"{n}: {there.get(n)} there, {asked[n]} asked for" for n in names)
        cure = "use them, another --output, or --restart to begin again"
        raise UserError(f"{where} comes from other settings ({changes}); {cure}")


def _last_checkpoint(output: Path, own: dict) -> tuple[str | None, int]:
    """Return the last checkpoint that is whole, and its step: Trainer writes its state at the end.

    Raises UserError where it comes from other settings than ``own``.
    """
    whole = []
    for path in output.glob("checkpoints/checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            state = json.loads(path.read_text(encoding="utf-8"))
            whole.append((state["global_step"], path.parent, state["log_history"][0]))
    if not whole:
        return None, 0
    step, checkpoint, start = max(whole)
    _refuse_others(checkpoint, start.get("settings", {}), own)
    return str(checkpoint), step
