# SPDX-License-Identifier: Apache-2.0
"""A tiny chat model, sums to teach it, and the command that does: what the commands' tests run."""

import contextlib
import json
from unittest.mock import patch

import torch

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = ["what", "is", "plus", "times", "the", "sum", "of", *NUMBERS]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def model(path):
    """Write a random Llama with a tokenizer of words as a Hugging Face folder; return ``path``."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = ["<eos>", "<unk>", "<user>", "<assistant>", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    ids = {"vocab_size": len(vocab), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **heads, **ids)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def sums(path):
    """Write fifty questions and answers, one a line; return ``path``."""
    rows = [
        {"prompt": f"what is {a} plus {b}", "response": f"the sum of {a} plus {b} is {b} times {a}"}
        for a in NUMBERS
        for b in NUMBERS[:5]
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def command(name, **options):
    """Return the words of a command that takes a tiny model no time."""
    given = {"dtype": "fp32", "device": "cpu", "batch-size": 4, "lr": 0.01, **options}
    return [name, *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


@contextlib.contextmanager
def interrupted(step):
    """Have Ctrl-C pressed in a run's step of this number."""
    from fastlora.commands.trainer import Trainer

    whole = Trainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    with patch.object(Trainer, "training_step", training_step):
        yield


def numbers(output):
    """Return what a run's metrics.json says that no clock decides."""
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name != "seconds"}
