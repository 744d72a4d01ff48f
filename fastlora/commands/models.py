# SPDX-License-Identifier: Apache-2.0
"""The model of a command: how it is loaded and adapted, and how it answers."""

import re
import tempfile
from pathlib import Path

import torch
from torch import nn

from fastlora.commands.shared import UserError, first_line

ANSWER_TOKENS = 48
# Of models that have no chat template: prompt, newline, answer, end.
_PLAIN = (
    "{% for m in messages %}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
)


def load_model(name: str, dtype: torch.dtype, bits: int | None = None) -> tuple[nn.Module, object]:
    """Load a model and its tokenizer from a Hugging Face folder, a hub id or a folder's .gguf.

    ``bits``, 4 or 8: its linear layers as bitsandbytes quantises them, NF4 with nested scales or
    int8; None leaves them as they are.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, dense = _gguf(name), {}
    if source and hasattr(transformers, "GgufConfig"):
        # Else weights may stay packed, and Trainer refuses a model that is marked as quantised.
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        tokenizer, kind = transformers.AutoTokenizer, transformers.AutoModelForCausalLM
        tokenizer = tokenizer.from_pretrained(name, **source)
        if bits is None:
            model = kind.from_pretrained(name, dtype=dtype, **source, **dense)
        else:
            model = _quantised(kind, name, dtype, bits, {**source, **dense})
    except (OSError, ValueError, ImportError) as error:  # a .gguf needs a package
        raise UserError(f"--model {name} cannot be loaded: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not tokenizer.chat_template:  # a template writes what begins a text, too
        tokenizer.chat_template = tokenizer.decode(tokenizer("")["input_ids"]) + _PLAIN
    return model, tokenizer


def _quantised(kind: type, name: str, dtype: torch.dtype, bits: int, source: dict) -> nn.Module:
    """Load a model in so many bits; a .gguf by way of a folder, as it has been quantised before."""
    import transformers

    how = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    how |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        if source:
            kind.from_pretrained(name, dtype=dtype, **source).save_pretrained(folder)
            name = folder
        model = kind.from_pretrained(name, dtype=dtype, quantization_config=config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # For inference weights would be packed anew, and unpacked for each state dict: each
            # time they are then a little different ones.
            module.support_avx512bf16_for_cpu = False
    return model


def empty_model(name: str) -> nn.Module:
    """Return what `load_model` would, on the meta device: the config alone is read.

    A model without a language head, which only ``tune`` takes, comes as it is.
    """
    import transformers

    source = _gguf(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name, **source)
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        kind = transformers.AutoModelForCausalLM if type(config) in causal else None
        with torch.device("meta"):
            return (kind or transformers.AutoModel).from_config(config)
    except Exception as error:  # whatever the reader of a damaged file may raise
        raise UserError(f"--model {name} cannot be read: {first_line(error)}") from error


def _gguf(folder: str) -> dict[str, str]:
    """Return what tells transformers to read the one .gguf of a folder without a config."""
    files = [] if Path(folder, "config.json").exists() else list(Path(folder).glob("*.gguf"))
    return {"gguf_file": files[0].name} if len(files) == 1 else {}


def adapted(model: nn.Module, targets: list[str], **lora: object) -> nn.Module:
    """Return ``model`` as a PeftModel with a new adapter; UserError for targets that PEFT refuses.

    ``targets``: names of layers, or one regular expression, or "all-linear" alone.
    """
    from peft import LoraConfig, get_peft_model

    one = len(targets) == 1 and not re.fullmatch(r"\w+", targets[0])
    try:
        config = LoraConfig(target_modules=targets[0] if one else targets, **lora)
        return get_peft_model(model, config)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"--target-modules: {first_line(error)}") from error


def answer(model: nn.Module, tokenizer, question: str) -> str:
    """Return the model's greedy answer on one line, at most ANSWER_TOKENS tokens long."""
    asked = [{"role": "user", "content": question}]
    how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    known = tokenizer.apply_chat_template(asked, **how).to(model.device)
    said = model.generate(**known, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    said = said[0, known["input_ids"].shape[1] :]
    cut = "…" if len(said) == ANSWER_TOKENS else ""
    return " ".join(tokenizer.decode(said, skip_special_tokens=True).split()) + cut
