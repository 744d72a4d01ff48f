# SPDX-License-Identifier: Apache-2.0
"""Draws few cases from many options, in place of their cross product."""

import itertools
from collections.abc import Sequence


def covering(*options: Sequence) -> list[tuple]:
    """Return rows of a value of each option in which every two values of two options meet.

    Always the same rows, hardly more of them than the two longest options have pairs.
    """
    sizes = [range(len(values)) for values in options]
    unmet = {  # a dict for its order
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(range(len(options)), 2)
        for i, j in itertools.product(sizes[a], sizes[b])
    }
    rows = []
    while unmet:
        row = dict(next(iter(unmet)))
        for option in [o for o in range(len(options)) if o not in row]:
            # Of those alike another one each time.
            turn = len(rows) % len(sizes[option])
            meeting = {
                i: sum(tuple(sorted([(option, i), other])) in unmet for other in row.items())
                for i in [*sizes[option][turn:], *sizes[option][:turn]]
            }
            row[option] = max(meeting, key=meeting.get)
        for pair in itertools.combinations(sorted(row.items()), 2):
            unmet.pop(pair, None)
        rows.append(tuple(values[row[o]] for o, values in enumerate(options)))
    return rows
