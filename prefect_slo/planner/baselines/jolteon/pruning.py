"""Support constraints: samples that another sample dominates cannot bind, so the program does without them.

A sample whose every stage is at least as slow in another sample, wherever it is asked, is implied by that one (Jolteon,
NSDI 2024, §4.3). Dominance is tested at the corners of the stages' boxes; formulas may bend between corners, so the
caller checks the solution against *all* samples and puts back what was left out too early (``program``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def support(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Positions of the samples that no other dominates, ascending; of equal samples one is kept.

    Args:
        values: Time of every stage at every corner, ``(n_samples, n_places)``.
    """
    order = np.argsort(-values.sum(axis=1), kind="stable")
    kept = np.empty((len(order), values.shape[1]))
    found: list[int] = []
    for at in order:
        if not (kept[: len(found)] >= values[at]).all(axis=1).any():
            kept[len(found)] = values[at]
            found.append(int(at))
    return np.array(sorted(found), dtype=np.intp)
