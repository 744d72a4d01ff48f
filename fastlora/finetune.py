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
from fastlora import checkpoint
from fastlora import finetune_data as data
from fastlora.finetune_data import UserError
from fastlora.finetune_model import (
    first_line,
    generate,
    gguf_file,
    load_model,
    require,
    response_loss,
    torch_device,
)

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

    def fingerprint(self) -> dict:
        """Return what a checkpoint must agree with: what decides the numbers, and a hash."""
        values = dataclasses.asdict(self)
        for name in ("output", "save_every", "restart"):
            del values[name]
        if isinstance(self.target_modules, tuple):
            values["target_modules"] = list(self.target_modules)
        values["device"] = str(torch_device(self.device))
        values["data sha256"] = hashlib.sha256(Path(self.data).read_bytes()).hexdigest()
        return values


def run(settings: Settings) -> dict:
    """Train, or go on with a run that was cut short, and return what metrics.json holds.

    Writes under ``settings.output``: adapter/ (PEFT's format), loss_curve.png and metrics.json;
    checkpoint.pt only until these are there. Raises UserError for what the user can put right.
    """
    examples = data.read_examples(settings.data)
    fingerprint = settings.fingerprint()
    require("transformers", "tqdm", "matplotlib", "accelerate")
    output = Path(settings.output)
    _make_folder(output)
    metrics_file, saved_file = output / "metrics.json", output / "checkpoint.pt"
    if settings.restart:
        metrics_file.unlink(missing_ok=True)
        saved_file.unlink(missing_ok=True)
    if metrics_file.exists():
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        _refuse_other_settings(metrics["settings"], fingerprint, metrics_file)
        say("finished", f"{output} holds this run already; --restart trains again")
        say("held out", f"{metrics['held_out_before']:.3f} -> {metrics['held_out_after']:.3f}")
        return metrics
    state = _load_state(saved_file, fingerprint) if saved_file.exists() else None
    try:
        metrics = _Run(settings, examples, fingerprint, state).all()
    except KeyboardInterrupt:
        print()
        kept = f"at {saved_file}" if saved_file.exists() else "not written yet"
        say("stopped", f"checkpoint {kept}; the same command goes on from there")
        raise
    text = json.dumps(metrics, indent=1, ensure_ascii=False)
    checkpoint.replace_file(metrics_file, lambda file: file.write(text.encode()))
    saved_file.unlink(missing_ok=True)
    say("wrote", ", ".join(str(output / n) for n in ("loss_curve.png", "metrics.json")))
    return metrics


class _Run:
    """One run's model, data and progress."""

    def __init__(
        self,
        settings: Settings,
        examples: list[data.Example],
        fingerprint: dict,
        state: dict | None,
    ) -> None:
        self.settings, self.fingerprint, self.state = settings, fingerprint, state
        self.device = torch_device(settings.device)
        name = f"{settings.model}, {settings.dtype} on {self.device}"
        say("model", f"{name}; loading may take half a minute")
        self.model, self.tokenizer = load_model(settings.model, DTYPES[settings.dtype])
        self.model.to(self.device)
        torch.manual_seed(settings.seed)
        say("inject", first_line(self._inject()))
        self.training, self.held_out = self._encode(examples)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)

    def all(self) -> dict:
        progress = self._start()
        self._train(progress)
        after = self._measure("after")
        output = Path(self.settings.output)
        say("saved", f"{output / 'adapter'} (PEFT format); loaded again, {self._save_and_check()}")
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
            "versions": {"fastlora": fastlora.__version__, "torch": torch.__version__},
            "losses": progress["losses"],
        }

    def _inject(self):
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
            return fastlora.inject(self.model, config)
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

    def _start(self) -> dict:
        """Return the progress so far: the checkpoint's, or that of a run that begins."""
        if self.state is None:
            before = self._measure("before")
            return {"step": 0, "losses": [], "tokens": 0, "seconds": 0.0, "before": before}
        checkpoint.restore(self.state, self.model, self.optimizer)
        progress = self.state["progress"]
        self.state = None
        say("resumed", f"after step {progress['step']} of {self.settings.steps}")
        return progress

    def _train(self, progress: dict) -> None:
        from tqdm import tqdm

        s = self.settings
        self.model.train()
        start = progress["step"]
        with tqdm(total=s.steps, initial=start, desc="training", unit="step") as bar:
            for step in range(start, s.steps):
                began = time.perf_counter()
                loss, tokens = self._step(step)
                progress["seconds"] += time.perf_counter() - began
                progress["losses"].append(loss)
                progress["tokens"] += tokens
                progress["step"] = step + 1
                rate = progress["tokens"] / progress["seconds"]
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} tokens/s", refresh=False)
                bar.update()
                if progress["step"] % s.save_every == 0 or progress["step"] == s.steps:
                    path = Path(s.output) / "checkpoint.pt"
                    own = {**progress, "settings": self.fingerprint}
                    checkpoint.save(path, self.model, self.optimizer, own)

    def _step(self, step: int) -> tuple[float, int]:
        s = self.settings
        indices = data.batch_indices(len(self.training), s.batch_size, s.seed, step)
        batch = self._batch([self.training[i] for i in indices])
        loss, count = response_loss(self.model, batch)
        (loss / count).backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * schedule(step, s.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() / count.item(), int(batch["attention_mask"].sum())

    def _batch(self, examples: list[data.Encoded]) -> dict[str, Tensor]:
        batch = data.collate(examples, self.tokenizer.pad_token_id)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

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
        say(when, f"held-out loss {total / count:.3f}")
        question = self.settings.ask
        answer = None if question is None else generate(self.model, self.tokenizer, question)
        if answer is not None:
            say("question", question)
            say("answer", answer)
        return {"loss": total / count, "answer": answer}

    @torch.no_grad()
    def _save_and_check(self) -> str:
        """Save the adapter, load it into the bare model, and return how the outputs compare."""
        folder, batch = Path(self.settings.output) / "adapter", self._held_out_batches()[0]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        trained = self.model(**inputs).logits
        fastlora.save_adapter(self.model, folder)
        fastlora.delete_adapter(self.model, "default")
        fastlora.load_adapter(self.model, folder, any_rank=True)  # written above
        loaded = self.model(**inputs).logits
        if torch.equal(trained, loaded):
            return "its outputs are identical"
        return f"its outputs differ by at most {(trained - loaded).abs().max().item():.2g}"

    def _draw(self, path: Path, progress: dict, after: dict) -> None:
        from fastlora import loss_curve

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
    except ValueError as error:
        raise UserError(f"{first_line(error)}; --restart begins again") from error
    _refuse_other_settings(state["progress"].pop("settings"), fingerprint, path)
    return state


def _refuse_other_settings(saved: dict, asked: dict, path: Path) -> None:
    names = [name for name in asked if saved.get(name) != asked[name]]
    if names:
        changes = ", ".join(f"{n}: {saved.get(n)} there, {asked[n]} asked for" for n in names)
        raise UserError(
            f"{path} comes from other settings ({changes}); "
            "use them, another --output, or --restart to begin again"
        )
