# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model with LoRA: load, train, resume, save, check, plot."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlora
from fastlora.commands import checkpoint
from fastlora.commands import finetune_data as data
from fastlora.commands.finetune_data import UserError
from fastlora.commands.finetune_model import (
    first_line,
    generate,
    gguf_file,
    load_model,
    require,
    response_loss,
)
from fastlora.commands.processes import Processes, rank
from fastlora.files import replace_file
from fastlora.model import unwrapped

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HELD_OUT_AT_MOST = 256
WARMUP = 0.05  # of all steps
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Everything but the last three decides its numbers."""

    model: str
    data: str
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
    steps: int = 200
    batch_size: int = 8
    seq_len: int = 512
    lr: float = 5e-4
    seed: int = 0
    held_out: float = 0.1
    ask: str | None = None
    dtype: str = "bf16"
    device: str | None = None
    output: str = "out/finetune"
    save_every: int = 50
    restart: bool = False

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch_size", "save_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("seq_len", self.seq_len >= 2, "at least 2")
        self._check("lr", 0 < self.lr < math.inf, "above 0")
        self._check("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self._check("held_out", 0 < self.held_out < 1, "between 0 and 1")
        self._check("dtype", self.dtype in DTYPES, " or ".join(DTYPES))

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be {expected}, got {getattr(self, name)}")

    def fingerprint(self, device: torch.device) -> dict:
        """Return what a checkpoint must agree with: what decides the numbers, and a hash."""
        values = dataclasses.asdict(self)
        for name in ("output", "save_every", "restart"):
            del values[name]
        if isinstance(self.target_modules, tuple):
            values["target_modules"] = list(self.target_modules)
        values["device"] = device.type
        values["data sha256"] = hashlib.sha256(Path(self.data).read_bytes()).hexdigest()
        return values


def run(settings: Settings) -> dict:
    """Train, or go on with a run that was cut short, and return what metrics.json holds.

    Writes under ``settings.output``: adapter/ (PEFT's format), loss_curve.png and metrics.json;
    checkpoint.pt only until these are there. Raises UserError for what the user can put right.
    """
    examples = data.read_examples(settings.data)
    require("transformers", "tqdm", "matplotlib", "accelerate")
    processes = Processes(settings.device)
    if settings.batch_size % processes.count:
        raise UserError(
            f"--batch-size {settings.batch_size} must be a multiple of the {processes.count} "
            "processes that share it"
        )
    fingerprint = settings.fingerprint(processes.device)
    output = Path(settings.output)
    saved_file, metrics_file = output / "checkpoint.pt", output / "metrics.json"
    state: dict = {}  # its tensors stay in the first process
    metrics, progress = processes.from_first(lambda: _left_by_before(settings, fingerprint, state))
    if metrics is not None:
        say("finished", f"{output} holds this run already; --restart trains again")
        say("held out", f"{metrics['held_out_before']:.3f} -> {metrics['held_out_after']:.3f}")
        return metrics
    try:
        metrics = _Run(settings, examples, fingerprint, processes).all(progress, state)
    except KeyboardInterrupt:
        print()
        kept = f"at {saved_file}" if saved_file.exists() else "not written yet"
        say("stopped", f"checkpoint {kept}; the same command goes on from there")
        raise
    if processes.first:
        text = json.dumps(metrics, indent=1, ensure_ascii=False)
        replace_file(metrics_file, lambda file: file.write(text.encode()))
        saved_file.unlink(missing_ok=True)
        say("wrote", ", ".join(str(output / n) for n in ("loss_curve.png", "metrics.json")))
    return processes.from_first(lambda: metrics)


def _left_by_before(
    settings: Settings, fingerprint: dict, state: dict
) -> tuple[dict | None, dict | None]:
    """Return the metrics of a run that finished, and the progress of one that did not.

    What else the checkpoint of the latter holds goes into ``state``.
    """
    output = Path(settings.output)
    _make_folder(output)
    metrics_file, saved_file = output / "metrics.json", output / "checkpoint.pt"
    if settings.restart:
        metrics_file.unlink(missing_ok=True)
        saved_file.unlink(missing_ok=True)
    if metrics_file.exists():
        try:
            metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
            saved = metrics["settings"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{metrics_file} is damaged; --restart begins again") from error
        _refuse_other_settings(saved, fingerprint, metrics_file)
        return metrics, None
    if not saved_file.exists():
        return None, None
    state |= _load_state(saved_file, fingerprint)
    return None, state.pop("progress")


class _Run:
    """One run's model, data and progress."""

    def __init__(
        self,
        settings: Settings,
        examples: list[data.Example],
        fingerprint: dict,
        processes: Processes,
    ) -> None:
        self.settings, self.fingerprint, self.processes = settings, fingerprint, processes
        name = f"{settings.model}, {settings.dtype} on {processes}"
        say("model", f"{name}; loading may take half a minute")
        model, self.tokenizer = load_model(settings.model, DTYPES[settings.dtype])
        torch.manual_seed(settings.seed)
        say("inject", first_line(self._inject(model)))
        self.training, self.held_out = self._encode(examples)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
        self.model, self.optimizer = processes.prepare(model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def all(self, progress: dict | None, state: dict) -> dict:
        """Train on from ``progress``, or from the start, and return what metrics.json holds."""
        progress = self._start(progress, state)
        self._train(progress)
        after = self._measure("after")
        output = Path(self.settings.output)
        say("saved", f"{output / 'adapter'} (PEFT format){self._save_and_check()}")
        if self.processes.first:
            self._draw(output / "loss_curve.png", progress, after)
        rate = progress["tokens"] / progress["seconds"]
        say("speed", f"{rate:.0f} tokens/s, {progress['seconds'] / 60:.1f} minutes of training")
        return {
            "settings": self.fingerprint,
            "held_out_before": progress["before"]["loss"],
            "held_out_after": after["loss"],
            "answer_before": progress["before"]["answer"],
            "answer_after": after["answer"],
            "trainable": sum(p.numel() for p in self.parameters),
            "tokens": progress["tokens"],
            "seconds": round(progress["seconds"], 2),
            "processes": self.processes.count,
            "versions": {"fastlora": fastlora.__version__, "torch": torch.__version__},
            "losses": progress["losses"],
            "gradient_norms": progress["gradient_norms"],
        }

    def _inject(self, model: nn.Module):
        s = self.settings
        try:
            config = fastlora.LoRAConfig(
                r=s.r,
                lora_alpha=s.alpha,
                lora_dropout=s.dropout,
                target_modules=s.target_modules,
                task_type="CAUSAL_LM",
                base_model_name_or_path=s.model,
            )
            return fastlora.inject(model, config)
        except (TypeError, ValueError) as error:
            raise UserError(first_line(error)) from error

    def _encode(self, examples: list[data.Example]) -> tuple[list[data.Encoded], ...]:
        s = self.settings
        sides = []
        for side in data.split(examples, s.held_out, s.seed, HELD_OUT_AT_MOST):
            encoded = [data.encode(self.tokenizer, example, s.seq_len) for example in side]
            sides.append([e for e in encoded if e is not None])
        training, held_out = sides
        if not training or not held_out:
            raise UserError(f"--seq-len {s.seq_len} leaves no token of any response; raise it")
        left_out = len(examples) - len(training) - len(held_out)
        note = f"; {left_out} left out (prompt longer than --seq-len)" if left_out else ""
        say("data", f"{len(training)} examples to train on, {len(held_out)} held out{note}")
        return training, held_out

    def _start(self, progress: dict | None, state: dict) -> dict:
        """Return the progress so far: the checkpoint's, or that of a run that begins."""
        if progress is None:
            before = self._measure("before")
            empty = {"losses": [], "gradient_norms": [], "tokens": 0, "seconds": 0.0}
            return {"step": 0, "before": before, **empty}
        try:
            self.processes.restore(self.model, self.optimizer, state)
        except ValueError as error:
            raise UserError(f"{first_line(error)}; --restart begins again") from error
        say("resumed", f"after step {progress['step']} of {self.settings.steps}")
        return progress

    def _train(self, progress: dict) -> None:
        from tqdm import tqdm

        s = self.settings
        self.model.train()
        start = progress["step"]
        shown = {"desc": "training", "unit": "step", "disable": not self.processes.first}
        with tqdm(total=s.steps, initial=start, **shown) as bar:
            for step in range(start, s.steps):
                began = time.perf_counter()
                loss, norm, tokens = self._step(step)
                progress["seconds"] += time.perf_counter() - began
                progress["losses"].append(loss)
                progress["gradient_norms"].append(norm)
                progress["tokens"] += tokens
                progress["step"] = step + 1
                rate = progress["tokens"] / progress["seconds"]
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s", refresh=False)
                bar.update()
                if progress["step"] % s.save_every == 0 or progress["step"] == s.steps:
                    state = self.processes.state(self.model, self.optimizer)
                    own = {**progress, "settings": self.fingerprint}
                    if self.processes.first:
                        checkpoint.save(
                            Path(s.output) / "checkpoint.pt", {**state, "progress": own}
                        )

    def _step(self, step: int) -> tuple[float, float, int]:
        """Return the loss, the norm of its gradient before clipping, and the tokens read."""
        s = self.settings
        indices = data.batch_indices(len(self.training), s.batch_size, s.seed, step)
        # What is dropped depends on the step alone, so that a run that goes on has the same.
        torch.manual_seed(data.step_seed(s.seed, step, self.processes.index))
        batch = self._batch([self.training[i] for i in self.processes.share(indices)])
        loss, count = response_loss(self.model, batch)
        count, tokens = self.processes.total(count, batch["attention_mask"].sum())
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * schedule(step, s.steps)
        norm = self.processes.step(loss / count, self.parameters, self.optimizer, CLIP_NORM)
        (loss,) = self.processes.total(loss.detach())
        self._check_finite(loss.item(), f"step {step + 1}")
        return loss.item() / count.item(), norm, int(tokens)

    def _check_finite(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            lr = f"--lr {self.settings.lr:g}"
            raise UserError(
                f"the loss is {loss} at {where}: {lr} is too high; --restart with a lower one"
            )

    def _batch(self, examples: list[data.Encoded]) -> dict[str, Tensor]:
        batch = data.collate(examples, self.tokenizer.pad_token_id)
        return {name: tensor.to(self.processes.device) for name, tensor in batch.items()}

    def _held_out_batches(self) -> list[dict[str, Tensor]]:
        size, ordered = self.settings.batch_size, sorted(self.held_out, key=lambda e: len(e.ids))
        return [self._batch(ordered[i : i + size]) for i in range(0, len(ordered), size)]

    @torch.no_grad()
    def _measure(self, when: str) -> dict:
        self.model.eval()
        total = count = 0
        for batch in self._held_out_batches():
            loss, tokens = response_loss(self.model, batch)
            total, count = total + loss.item(), count + tokens.item()
        self._check_finite(total, f"the end, {when} training")
        say(when, f"held-out loss {total / count:.3f}")
        question = self.settings.ask
        bare = unwrapped(self.model)
        answer = None if question is None else generate(bare, self.tokenizer, question)
        if answer is not None:
            say("question", question)
            say("answer", answer)
        return {"loss": total / count, "answer": answer}

    @torch.no_grad()
    def _save_and_check(self) -> str:
        """Save the adapter, load it into the bare model, and return how the outputs compare."""
        folder, batch = Path(self.settings.output) / "adapter", self._held_out_batches()[0]
        model = unwrapped(self.model)
        if self.processes.sharded:
            fastlora.save_adapter(model, folder)
            return ", from all processes' shards"
        if not self.processes.first:
            return ""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        trained = model(**inputs).logits
        fastlora.save_adapter(model, folder)
        fastlora.delete_adapter(model, "default")
        fastlora.load_adapter(model, folder, any_rank=True)  # written above
        loaded = model(**inputs).logits
        if torch.equal(trained, loaded):
            return "; loaded again, its outputs are identical"
        largest = (trained - loaded).abs().max().item()
        return f"; loaded again, its outputs differ by at most {largest:.2g}"

    def _draw(self, path: Path, progress: dict, after: dict) -> None:
        from fastlora.commands import loss_curve

        s = self.settings
        gguf = gguf_file(s.model)
        loss_curve.draw(
            path,
            progress["losses"],
            progress["before"]["loss"],
            after["loss"],
            title=f"{gguf.stem if gguf else Path(s.model).name}: LoRA fine-tuning",
            subtitle=f"r = {s.r}, dropout {s.dropout:g}, lr {s.lr:g}, "
            f"{s.batch_size} examples a step, {s.dtype}",
        )


def say(what: str, text: object) -> None:
    if rank() == 0:
        print(f"{what:<9} {text}", flush=True)


def schedule(step: int, steps: int) -> float:
    """Return the factor on the learning rate: a linear warm-up, then half a cosine towards 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made: {error.strerror}") from error


def _load_state(path: Path, fingerprint: dict) -> dict:
    try:
        state = checkpoint.load(path)
        saved = state["progress"].pop("settings")
    except (ValueError, KeyError) as error:
        raise UserError(f"{first_line(error)}; --restart begins again") from error
    _refuse_other_settings(saved, fingerprint, path)
    return state


def _refuse_other_settings(saved: dict, asked: dict, path: Path) -> None:
    names = [name for name in asked if saved.get(name) != asked[name]]
    if names:
        changes = ", ".join(f"{n}: {saved.get(n)} there, {asked[n]} asked for" for n in names)
        raise UserError(
            f"{path} comes from other settings ({changes}); "
            "use them, another --output, or --restart to begin again"
        )
