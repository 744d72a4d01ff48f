# SPDX-License-Identifier: Apache-2.0
"""The model of a fine-tuning run: how it is loaded, what its loss is, how it answers."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.commands import finetune_data as data
from fastlora.commands.finetune_data import IGNORED, UserError
from fastlora.model import unwrapped

ANSWER_TOKENS = 48


def load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """Load a model and its tokenizer from a Hugging Face folder, a hub id or a folder's .gguf."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source: dict = {}
    dense: dict = {}
    quiet = contextlib.nullcontext()
    gguf = gguf_file(name)
    if gguf is not None:
        require("gguf", extra="demo")
        source = {"gguf_file": gguf.name}
        quiet = contextlib.redirect_stderr(io.StringIO())  # a progress bar with no switch
        if hasattr(transformers, "GgufConfig"):  # newer releases may keep the weights packed
            dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        with quiet:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, **source, **dense
            )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return model, tokenizer


def empty_model(name: str) -> nn.Module:
    """Return what `load_model` would, on the meta device: the config alone is read.

    A model without a language head, which only ``tune`` takes, comes as it is.
    """
    require("transformers")
    import transformers

    gguf = gguf_file(name)
    if gguf is not None:
        require("gguf", extra="demo")
    try:
        source = {"gguf_file": gguf.name} if gguf else {}
        config = transformers.AutoConfig.from_pretrained(name, **source)
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = transformers.AutoModelForCausalLM if type(config) in causal else None
        with torch.device("meta"):
            return (kind or transformers.AutoModel).from_config(config)
    except Exception as error:  # whatever the reader of a damaged file may raise
        raise UserError(f"--model {name} cannot be read: {first_line(error)}") from error


def gguf_file(folder: str) -> Path | None:
    files = [] if Path(folder, "config.json").exists() else list(Path(folder).glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def response_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the batch's labelled tokens, and how many they are.

    Logits are made only where some row has a label: the vocabulary is the widest product.
    """
    targets = batch["labels"][:, 1:]
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, keep]
    targets = targets[:, keep]  # [B, kept] beside logits [B, kept, vocabulary]
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, (targets != IGNORED).sum()


def generate(model: nn.Module, tokenizer, question: str) -> str:
    """Return the model's greedy answer on one line, at most ANSWER_TOKENS tokens long."""
    ids = torch.tensor([data.prompt_ids(tokenizer, question)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0, ids.shape[1] :]
    cut = "…" if len(output) == ANSWER_TOKENS else ""
    return " ".join(tokenizer.decode(output, skip_special_tokens=True).split()) + cut


def torch_device(name: str | None) -> torch.device:
    """Return the device that --device names, by default a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def require(*modules: str, extra: str = "finetune") -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        what = " and ".join(missing)
        raise UserError(f'{what} not installed: pip install "fastlora-kernels[{extra}]"')


def first_line(thing: object) -> str:
    return str(thing).strip().partition("\n")[0]
