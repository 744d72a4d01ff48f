# SPDX-License-Identifier: Apache-2.0
"""Small inputs for a model of transformers, by what it says of itself."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Of what no config says the size.
SIDE, FRAMES, SAMPLES, TOKENS = 224, 128, 16_000, 2


def examples_for(model: nn.Module) -> list[dict[str, Any]]:
    """Return inputs of one sample that ``model`` may take, the fullest first; none if it is silent.

    Its ``dummy_inputs``, which of most models are text, and by the sizes in its config what its
    forward names: images, spectrograms, sound, the first tokens of a decoder.
    """
    taken = inspect.signature(model.forward).parameters
    own = getattr(model, "dummy_inputs", None)
    text = {
        name: value[:1] if isinstance(value, Tensor) and value.dim() else value
        for name, value in (own.items() if isinstance(own, Mapping) else ())
        if name in taken
    }
    made = {k: v for k, v in _made(model).items() if k in taken and k not in text}
    full = [{**text, **dict(zip(made, v, strict=True))} for v in itertools.product(*made.values())]
    main = getattr(model, "main_input_name", None), "decoder_input_ids"
    least = [{k: v for k, v in each.items() if k in main} for each in full]
    return [each for each in (*full, *least, text) if each]


def _made(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return what an input may be, by its name: models differ in the order of dimensions."""
    config = getattr(model, "config", None)
    if config is None:
        return {}
    configs = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def said(*names: str, default: Any = None) -> Any:
        values = (getattr(each, name, None) for each in configs for name in names)
        return next((value for value in values if value), default)

    def zeros(*shapes: tuple[int | None, ...]) -> list[Tensor]:
        return [torch.zeros(1, *shape, dtype=dtype) for shape in shapes if None not in shape]

    sides = said("image_size", default=SIDE)
    sides = sides.values() if isinstance(sides, Mapping) else sides
    image = (
        said("num_channels", "in_channels", default=3),
        *((sides, sides) if isinstance(sides, int) else tuple(sides)[-2:]),
    )
    bands = said("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
    whole = 2 * said("max_source_positions", default=FRAMES)  # what Whisper asks for
    return {
        "pixel_values": zeros((said("num_frames"), *image), image),
        "input_features": zeros((bands, FRAMES), (FRAMES, bands), (bands, whole)),
        "input_values": zeros((said("max_length") if bands else None, bands), (SAMPLES,)),
        "decoder_input_ids": [torch.zeros(1, TOKENS, dtype=torch.long)],
    }
