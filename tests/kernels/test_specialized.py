# SPDX-License-Identifier: Apache-2.0
"""Lengths of a batch change from step to step: what is compiled for a few of them serves all."""

from __future__ import annotations

from uninterpreted import lines_of


def test_two_lengths_compile_what_all_need():
    """Two of each power of two, one that 16 divides; of 150 others none needs another program."""
    found = lines_of("specialized.py")
    assert len(found) == 36
    assert not {row["name"]: row["more"] for row in found if row["more"]}
    assert max(row["few"] for row in found) <= 32
