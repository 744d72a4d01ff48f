# SPDX-License-Identifier: Apache-2.0
"""Small problems for the benchmarks' tests."""

import decoder_layer
import pytest


@pytest.fixture
def small_decoders(monkeypatch):
    sizes = {"plain": (32, 16, 48, False), "biased": (32, 16, 48, True)}
    monkeypatch.setattr(decoder_layer, "SIZES", sizes)
    monkeypatch.setattr(decoder_layer, "ON_CPU", tuple(sizes))
