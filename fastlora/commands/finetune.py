# SPDX-License-Identifier: Apache-2.0
"""``python -m fastlora finetune``: LoRA on a causal language model, by PEFT and TRL's trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.commands import data, models, shared
from fastlora.commands.shared import UserError, check, first_line, option, rank, say

HELD_OUT_AT_MOST = 256
WARMUP = 0.05  # of all steps
PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "tqdm", "matplotlib")
_LINES = 'JSONL: "prompt" and "response", "messages", or "text" on each line'


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Everything but output, save_every and restart decides its numbers."""

    model: str = option(MISSING, "Hugging Face folder or id, or a folder with one .gguf")
    data: str = option(MISSING, _LINES)
    output: str = option("out/finetune", "folder for the adapter, curve and metrics")
    ask: str | None = option(None, "a question to answer before and after")
    r: int = option(16, "rank")
    target_modules: str | tuple[str, ...] = option(
        ("all-linear",), "layer names, one regular expression, or all-linear", metavar="NAME"
    )
    alpha: float = option(32.0, "scaling is alpha / r")
    dropout: float = option(0.05, "on the adapters' input")
    steps: int = option(200, "optimizer steps")
    batch_size: int = option(8, "examples a step")
    seq_len: int = option(512, "tokens kept of each example")
    lr: float = option(5e-4, "peak learning rate")
    seed: int = option(0, "decides order, split, start and dropout")
    held_out: float = option(0.1, "fraction never trained on")
    dtype: str = option("bf16", "of the frozen model", choices=("bf16", "fp32"))
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    save_every: int = option(50, "steps between checkpoints")
    restart: bool = option(False, "begin again, whatever --output holds")

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch_size", "save_every"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        check(self, "seq_len", self.seq_len >= 2, "at least 2")
        check(self, "lr", 0 < self.lr < math.inf, "above 0")
        check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        check(self, "held_out", 0 < self.held_out < 1, "between 0 and 1")

    def fingerprint(self, device: torch.device) -> dict[str, Any]:
        """Return what a run that goes on must agree with: what decides the numbers, and a hash."""
        more = {"device": device.type, "sharded": _sharded()}  # checkpoints differ, too
        values = json.loads(json.dumps(dataclasses.asdict(self) | more))
        for name in ("output", "save_every", "restart"):
            del values[name]
        values["data sha256"] = hashlib.sha256(Path(self.data).read_bytes()).hexdigest()
        return values


def run(settings: Settings) -> dict[str, Any]:
    """Train, or go on with a run that was cut short, and return what metrics.json holds.

    Writes under ``settings.output``: adapter/ (PEFT's format), loss_curve.png and metrics.json;
    run.json and checkpoints/ (Trainer's) only until these are there. Raises UserError for what the
    user can put right.
    """
    examples = data.read_examples(settings.data)
    shared.require(*PACKAGES)
    config = _config(settings)
    output, fingerprint = Path(settings.output), settings.fingerprint(config.device)
    with config.main_process_first(local=False):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output} cannot be made: {error.strerror}") from error
        if settings.restart and rank() == 0:
            _forget(output, "metrics.json")
        metrics = _read(output / "metrics.json", fingerprint)
        begun = _read(output / "run.json", fingerprint)
    if metrics is not None:
        say("finished", f"{output} holds this run already; --restart trains again")
        say("held out", f"{metrics['held_out_before']:.3f} -> {metrics['held_out_after']:.3f}")
        return metrics
    try:
        metrics = _Run(settings, config, examples, begun or {"settings": fingerprint}).all()
    except KeyboardInterrupt:
        kept = _last_checkpoint(output) or "not written yet"
        say("stopped", f"checkpoint {kept}; the same command goes on from there")
        raise
    if rank() == 0:
        shared.write_json(output / "metrics.json", metrics)
        _forget(output)
        say("wrote", ", ".join(str(output / n) for n in ("loss_curve.png", "metrics.json")))
    return metrics


def _config(s: Settings) -> Any:
    """Return TRL's configuration of a run, in one of its processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and s.device is not None:
        raise UserError(f"--device {s.device}: several processes get theirs from accelerate")
    check(s, "batch_size", s.batch_size % count == 0, f"a multiple of the {count} processes")
    # Left alone, Accelerate takes processes without a GPU for so many runs of one.
    device = shared.torch_device(s.device)
    cpu = device.type == "cpu"
    if device.index:
        raise UserError(f"--device {s.device}: choose by CUDA_VISIBLE_DEVICES, as Trainer does")
    wrong = _sharded() and (cpu or os.environ.get("FSDP_VERSION") != "2")
    if wrong or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError("accelerate's configuration must be data-parallel, or FSDP2 on GPUs")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # --dtype says it
    from trl import SFTConfig

    shares = {"per_device_train_batch_size": s.batch_size // count}
    steps = {"max_steps": s.steps, "learning_rate": s.lr, "seed": s.seed, "optim": "adamw_torch"}
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": round(WARMUP * s.steps)}
    saved = {"output_dir": f"{s.output}/checkpoints", "save_steps": s.save_every}
    shown = {"logging_steps": 1, "logging_nan_inf_filter": False, "disable_tqdm": False}
    ours = {"dataset_kwargs": {"skip_prepare_dataset": True}, "save_total_limit": 1}
    none = {"bf16": False, "gradient_checkpointing": False, "ddp_find_unused_parameters": False}
    none |= {"router_aux_loss_coef": 0.0}  # the loss is that of the answers alone
    where = {"use_cpu": cpu, "dataloader_pin_memory": not cpu, "report_to": "none"}
    config = SFTConfig(**shares, **steps, **schedule, **saved, **shown, **ours, **none, **where)
    config._n_gpu = min(config.n_gpu, 1)  # one process uses one, however many it sees
    return config


def _sharded() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _read(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a run with these settings left in a file; refuse that of another."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        saved = dict(found["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; --restart begins again") from error
    names = [name for name in asked if saved.get(name) != asked[name]]
    if names:
        changes = ", ".join(f"{n}: {saved.get(n)} there, {asked[n]} asked for" for n in names)
        raise UserError(
            f"{path} comes from other settings ({changes}); "
            "use them, another --output, or --restart to begin again"
        )
    return found


def _forget(output: Path, *more: str) -> None:
    """Delete what a run that is not done goes on from."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for name in ("run.json", *more):
        (output / name).unlink(missing_ok=True)


def _last_checkpoint(output: Path) -> Path | None:
    """Return the last checkpoint that is whole: Trainer writes its state at the end."""
    whole = []
    for path in output.glob("checkpoints/checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):
            whole.append((json.loads(path.read_text())["global_step"], path.parent))
    return max(whole)[1] if whole else None


class _Run:
    """One run's model, data and trainer."""

    def __init__(self, s: Settings, config: Any, examples: list, begun: dict[str, Any]) -> None:
        from datasets import Dataset
        from transformers import set_seed
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        import fastlora
        from fastlora.commands.trainer import Progress, ProgressCallback, Trainer

        self.settings, self.output, self.begun = s, Path(s.output), begun
        where, how = config.device.type, "FSDP2" if _sharded() else "data-parallel"
        if config.world_size > 1:
            where = f"{config.world_size} processes ({how}, {where})"
        say("model", f"{s.model}, {s.dtype} on {where}; loading may take half a minute")
        model, self.tokenizer = models.load_model(s.model, shared.DTYPES[s.dtype])
        torch.manual_seed(s.seed)
        lora = {"r": s.r, "lora_alpha": s.alpha, "lora_dropout": s.dropout}
        model = models.adapted(model, s.target_modules, task_type="CAUSAL_LM", **lora)
        say("adapter", first_line(fastlora.patch_peft(model)))
        training, held_out = self._encode(examples)
        order = data.order(len(training), s.steps * s.batch_size, s.seed)
        read = list(itertools.accumulate(len(training[i]["input_ids"]) for i in order))
        self.progress = Progress(read[s.batch_size - 1 :: s.batch_size], self._begin)
        collate = DataCollatorForLanguageModeling(self.tokenizer.pad_token_id)
        held_out.sort(key=lambda row: len(row["input_ids"]))
        starts = range(0, len(held_out), s.batch_size)
        self.held_out = [collate(held_out[i : i + s.batch_size]) for i in starts]
        rows = Dataset.from_list(training).select(order)
        self.trainer = Trainer(model, config, collate, rows, processing_class=self.tokenizer)
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.add_callback(self.progress)
        set_seed(s.seed + rank())  # each process drops others

    def all(self) -> dict[str, Any]:
        """Train, from the last checkpoint on, and return what metrics.json holds."""
        self._train()
        trainer, tokens, after = self.trainer, self.progress.tokens[-1], self._measure("after")
        trainable, _ = trainer.model.get_nb_trainable_parameters()
        say("saved", f"{self.output / 'adapter'} (PEFT format){self._save_and_check()}")
        import fastlora

        steps = [row for row in trainer.state.log_history if "loss" in row]
        losses, seconds = [row["loss"] for row in steps], steps[-1]["seconds"]
        if rank() == 0:
            from fastlora.commands.pictures import loss_curve

            s, ends = self.settings, (self.begun["held_out_before"], after["held_out_after"])
            how = f"r = {s.r}, dropout {s.dropout:g}, lr {s.lr:g}, {s.batch_size} examples a step"
            loss_curve(self.output, losses, ends, f"{models.title(s.model)}: LoRA fine-tuning", how)
        say("speed", f"{tokens / seconds:.0f} tokens/s, {seconds / 60:.1f} minutes of training")
        return {
            **self.begun,
            **after,
            "trainable": trainable,
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "processes": trainer.args.world_size,
            "versions": {"fastlora": fastlora.__version__, "torch": torch.__version__},
            "losses": losses,
            "gradient_norms": [row["grad_norm"] for row in steps],
        }

    def _train(self) -> None:
        checkpoint = _last_checkpoint(self.output) if "held_out_before" in self.begun else None
        if checkpoint is not None:
            step = checkpoint.name.rpartition("-")[2]
            say("resumed", f"after step {step} of {self.settings.steps}")
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except Exception as error:  # whatever reading a damaged file may raise
            if checkpoint is None or self.progress.loaded:
                raise
            text = f"{checkpoint} is damaged: {type(error).__name__}: {first_line(error)}"
            raise UserError(f"{text}; --restart begins again") from error
        finally:
            if self.progress.training_bar is not None:
                self.progress.training_bar.close()

    def _encode(self, examples: list[data.Example]) -> list[list[data.Encoded]]:
        s, sides = self.settings, []
        for side in data.split(examples, s.held_out, s.seed, HELD_OUT_AT_MOST):
            encoded = [data.encode(self.tokenizer, example, s.seq_len) for example in side]
            sides.append([e for e in encoded if e is not None])
        if not all(sides):
            raise UserError(f"--seq-len {s.seq_len} leaves no token of any response; raise it")
        left_out = len(examples) - sum(map(len, sides))
        note = f"; {left_out} left out (prompt longer than --seq-len)" if left_out else ""
        say("data", f"{len(sides[0])} examples to train on, {len(sides[1])} held out{note}")
        return sides

    def _begin(self) -> None:
        """Note what the model is before the first step."""
        self.begun |= self._measure("before")
        if rank() == 0:
            shared.write_json(self.output / "run.json", self.begun)

    @torch.no_grad()
    def _measure(self, when: str) -> dict[str, Any]:
        s, model, here = self.settings, self.trainer.model.eval(), self.trainer._prepare_inputs
        found = [models.response_loss(model, here(dict(batch))) for batch in self.held_out]
        loss, count = (sum(each.item() for each in column) for column in zip(*found, strict=True))
        shared.check_finite(loss, f"the end, {when} training", s.lr)
        say(when, f"held-out loss {loss / count:.3f}")
        text = None
        if s.ask is not None:
            text = models.answer(model, self.tokenizer, s.ask)
            say("question", s.ask)
            say("answer", text)
        return {f"held_out_{when}": loss / count, f"answer_{when}": text}

    @torch.no_grad()
    def _save_and_check(self) -> str:
        """Save the adapter, load it beside the trained one; return how the outputs compare."""
        import fastlora

        folder, model = self.output / "adapter", self.trainer.model
        if _sharded() or rank() == 0:
            fastlora.save_adapter(model, folder)
        if _sharded() or rank():
            return ", from all processes' shards"
        batch = self.trainer._prepare_inputs(dict(self.held_out[0]))
        del batch["labels"]
        trained = model(**batch).logits
        model.load_adapter(str(folder), "saved", torch_device=str(model.device))
        model.set_adapter("saved")
        difference = (trained - model(**batch).logits).abs().max().item()
        same = f"differ by at most {difference:.2g}" if difference else "are identical"
        return f"; loaded again, its outputs {same}"
