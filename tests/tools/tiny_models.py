# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, always the same ones, and inputs for them."""

import torch
import transformers
from torch import nn

VOCABULARY = 40
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES["num_attention_heads"] = 4
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY}


def llama(**changes):
    """Linear layers without bias, fewer key than query heads, an output head of its own."""
    return _made("LlamaForCausalLM", **{**TEXT, **changes})


def gpt2():
    """Conv1D layers, and an output head that is the embedding."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return _made("GPT2LMHeadModel", vocab_size=VOCABULARY, **sizes)


def bert():
    """Linear layers with bias, and a classifier."""
    return _made("BertForSequenceClassification", vocab_size=VOCABULARY, num_labels=3, **SIZES)


def decoder(name, **changes):
    """A decoder of transformers by the name that its classes begin with."""
    return _made(f"{name}ForCausalLM", **{**TEXT, "pad_token_id": 0, **changes})


# Sizes of mixtures of experts by the name that their classes begin with.
EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    "DeepseekV3": {
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
    "Llama4": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 1],
        "head_dim": 4,
    },
}


def experts(name, implementation="eager"):
    """A mixture of experts of `EXPERTS` that runs by an implementation of transformers'."""
    model = decoder(name, **EXPERTS[name])
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def t5():
    """An encoder and a decoder, whose linear layers are called q, k, v, o, wi and wo."""
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    rest = {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    return _made("T5ForConditionalGeneration", **sizes, **rest)


def vit():
    """Images in, classes out."""
    sizes = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    return _made("ViTForImageClassification", **SIZES, **sizes)


def diffusion_transformer():
    """Attention with to_q, to_k, to_v and to_out.0, as in diffusers."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    rest = {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 2}
    return DiTTransformer2DModel(**sizes, **rest).eval()


def mlp(bias=True):
    """Linear layers called 0, 2 and head, and what is none between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.LayerNorm(8), nn.Linear(8, 8, bias=bias))
    model.add_module("head", nn.Linear(8, 5, bias=bias))
    return model.eval()


class MLP(nn.Module):
    """A gated one."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*d) for d in ((8, 24), (8, 24), (24, 8)))

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Three siblings, and a gated MLP; always the same weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(self.q(x) + self.k(x) * self.v(x))


def tokens():
    return torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(inner, nn.Sequential):
        return model(torch.linspace(-1, 1, 18).reshape(3, 6))
    return model(tokens()).logits


@torch.no_grad()
def train_a_little(model):
    """Move every trainable parameter, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def bits(model):
    """Everything of a model that may not change: names, values, what trains, classes, modes."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    kinds = {name: (type(m), m.training) for name, m in model.named_modules()}
    return state, trains, kinds


def same(before, after):
    """Whether two results of `bits` are equal bit for bit."""
    (state, *rest), (other, *others) = before, after
    alike = state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    return alike and rest == others


def _made(name, **sizes):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**sizes)
    config.initializer_range = 0.3  # large enough for every layer to matter
    return kind(config).eval()
