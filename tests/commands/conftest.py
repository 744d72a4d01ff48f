# SPDX-License-Identifier: Apache-2.0
"""A tiny chat model and fifty sums, as the commands read them."""

from types import SimpleNamespace

import pytest
import tiny_chat


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, data = tiny_chat.model(folder / "model"), tiny_chat.sums(folder / "sums.jsonl")
    return SimpleNamespace(model=model, data=data)
