# SPDX-License-Identifier: Apache-2.0
"""Inputs of one sample that a model may take, by what it and its config say of themselves."""

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def samples_for(model: nn.Module) -> list[dict[str, Any]]:
    """Return inputs of one sample that ``model`` may take, the fullest first; none if it is silent.

    Its ``dummy_inputs``, and what its forward names, by its config: images, spectrograms, sound.
    """
    taken = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    parts = getattr(config, "__dict__", {}).values()
    configs = [config, *(part for part in parts if hasattr(part, "to_dict"))]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def said(*names: str, default: Any = None) -> Any:
        values = (getattr(each, name, None) for each in configs for name in names)
        return next(filter(None, values), default)

    sides = said("image_size", default=224)
    sides = sides.values() if isinstance(sides, Mapping) else sides
    sides = [sides] * 2 if isinstance(sides, int) else [*sides][-2:]
    image = said("num_channels", "in_channels", default=3), *sides
    bands = said("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
    whole = 2 * said("max_source_positions", default=64)  # what Whisper asks for
    shapes = {
        "pixel_values": [(said("num_frames"), *image), image],
        "input_features": [(bands, 128), (128, bands), (bands, whole)],
        "input_values": [(said("max_length") if bands else None, bands), (16_000,)],
    }
    own = getattr(model, "dummy_inputs", None)
    own = {k: v for k, v in own.items() if k in taken} if isinstance(own, Mapping) else {}
    text = {k: v[:1] if isinstance(v, Tensor) and v.dim() else v for k, v in own.items()}
    start = {k: torch.zeros(1, 2, dtype=torch.long) for k in ("decoder_input_ids",) if k in taken}
    names = [name for name in shapes if name in taken and name not in text]
    full = []
    for several in itertools.product(*map(shapes.get, names)):
        if None not in itertools.chain(*several):
            made = [torch.zeros(1, *shape, dtype=dtype) for shape in several]
            full.append({**start, **text, **dict(zip(names, made, strict=True))})
    main = getattr(model, "main_input_name", None), "decoder_input_ids"
    least = [{k: v for k, v in each.items() if k in main} for each in full]
    return [each for each in (*full, *least, text) if each]
