# SPDX-License-Identifier: Apache-2.0
"""The model of a command: how it is loaded and adapted, what its loss is, how it answers."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.commands.data import IGNORED, prompt_ids
from fastlora.commands.shared import UserError, first_line, require

ANSWER_TOKENS = 48

Targets = str | tuple[str, ...]


def load_model(name: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """Load a model and its tokenizer from a Hugging Face folder, a hub id or a folder's .gguf."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, dense = gguf(name), {}
    if source and hasattr(transformers, "GgufConfig"):
        # Else weights may stay packed, and Trainer refuses a model that is marked as quantised.
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        # Reading a .gguf has a progress bar with no switch.
        with contextlib.redirect_stderr(io.StringIO()) if source else contextlib.nullcontext():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
            kind = transformers.AutoModelForCausalLM
            model = kind.from_pretrained(name, dtype=dtype, **source, **dense)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    return model, tokenizer


def empty_model(name: str) -> nn.Module:
    """Return what `load_model` would, on the meta device: the config alone is read.

    A model without a language head, which only ``tune`` takes, comes as it is.
    """
    require("transformers", "peft")
    import transformers

    source = gguf(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source)
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = transformers.AutoModelForCausalLM if type(config) in causal else None
        with torch.device("meta"):
            return (kind or transformers.AutoModel).from_config(config)
    except Exception as error:  # whatever the reader of a damaged file may raise
        raise UserError(f"--model {name} cannot be read: {first_line(error)}") from error


def gguf(folder: str) -> dict[str, str]:
    """Return what tells transformers to read the one .gguf of a folder without a config."""
    files = [] if Path(folder, "config.json").exists() else list(Path(folder).glob("*.gguf"))
    if len(files) != 1:
        return {}
    require("gguf", extra="demo")
    return {"gguf_file": files[0].name}


def title(name: str) -> str:
    """Return a model's name for a picture."""
    return gguf(name).get("gguf_file", Path(name).name).removesuffix(".gguf")


def adapted(model: nn.Module, targets: Targets, **lora: object) -> nn.Module:
    """Return ``model`` as a PeftModel with a new adapter on ``targets``, as --target-modules says.

    Raises UserError for targets that PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    chosen = targets if isinstance(targets, str) else list(targets)
    try:
        return get_peft_model(model, LoraConfig(target_modules=chosen, **lora))
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"--target-modules: {first_line(error)}") from error


def response_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the batch's labelled tokens, and how many they are.

    Logits are made only where some row has a label: the vocabulary is the widest product.
    """
    targets = batch["labels"][:, 1:]
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kind = type(getattr(model, "module", model).get_base_model())  # TRL hides its forward
    if "logits_to_keep" in inspect.signature(kind.forward).parameters:
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, keep]
    targets = targets[:, keep]  # [B, kept] beside logits [B, kept, vocabulary]
    loss = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, (targets != IGNORED).sum()


def answer(model: nn.Module, tokenizer, question: str) -> str:
    """Return the model's greedy answer on one line, at most ANSWER_TOKENS tokens long."""
    ids = torch.tensor([prompt_ids(tokenizer, question)], device=model.device)
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
    output = model.generate(**known, **how, pad_token_id=tokenizer.pad_token_id)
    output = output[0, ids.shape[1] :]
    cut = "…" if len(output) == ANSWER_TOKENS else ""
    return " ".join(tokenizer.decode(output, skip_special_tokens=True).split()) + cut
