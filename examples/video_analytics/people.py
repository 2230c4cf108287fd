"""People in frames: histograms of oriented gradients and a linear classifier (Dalal and Triggs, CVPR 2005).

One detector in two variants. ``on_cores`` is OpenCV's own, frame by frame. ``on_arrays`` is the same arithmetic on a
whole batch of frames at once, written once for NumPy and CuPy. The weights ship with OpenCV 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
"""A picture in OpenCV's order of colours, ``(height, width, 3)``."""

WINDOW = (128, 64)  # height and width of what the classifier looks at
CELL, BINS = 8, 9
BLOCKS = (15, 7)  # in a window, one every cell, of 2 x 2 cells each
STEP = 1.05  # from a scale to the next
NEIGHBOURS, ALIKE = 2, 0.2  # windows that make a person, and how far apart they may be


class Person(NamedTuple):
    """Where somebody was found, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Hit(NamedTuple):
    """A window that the classifier takes for a person; several make one."""

    person: Person
    score: float


def on_cores(frames: Sequence[Frame]) -> list[list[Person]]:
    """People in each frame, by OpenCV on the cores that this process has."""
    return [people(hits_on_cores(frame)) for frame in frames]


def on_arrays(frames: Sequence[Frame], xp: ModuleType = np) -> list[list[Person]]:
    """People in each frame, by array code.

    Args:
        frames: Of one shape.
        xp: NumPy, or CuPy for the GPU.
    """
    return [people(hits) for hits in hits_on_arrays(frames, xp)]


def people(hits: Sequence[Hit]) -> list[Person]:
    """Windows that lie close together are one person, a single one is none."""
    grouped, _ = cv2.groupRectangles([list(hit.person) for hit in hits], NEIGHBOURS, ALIKE)
    return sorted(Person(*map(int, box)) for box in grouped)


def hits_on_cores(frame: Frame) -> list[Hit]:
    """Every window of a frame that OpenCV takes for a person."""
    found, scores = _opencv().detectMultiScale(frame, winStride=(CELL, CELL), scale=STEP, groupThreshold=0)
    return [Hit(Person(*map(int, box)), float(score)) for box, score in zip(found, np.ravel(scores), strict=True)]


def hits_on_arrays(frames: Sequence[Frame], xp: ModuleType = np) -> list[list[Hit]]:
    """Every window of each frame that the classifier takes for a person.

    The batch goes to the device once, and the scores of all its windows come back once.
    """
    batch, classifier = xp.asarray(np.stack(frames)), _classifier(xp)
    scales = _scales(*batch.shape[1:3])
    scores = [_scores(_resized(batch, *size, xp), classifier, xp) for _, size in scales]
    flat = xp.concatenate([of_scale.reshape(len(frames), -1) for of_scale in scores], axis=1)
    told = flat if xp is np else xp.asnumpy(flat)
    found: list[list[Hit]] = [[] for _ in frames]
    begin = 0
    for (scale, _), of_scale in zip(scales, scores, strict=True):
        _, rows, columns = of_scale.shape
        here = told[:, begin : begin + rows * columns]
        begin += rows * columns
        height, width = round(WINDOW[0] * scale), round(WINDOW[1] * scale)
        for frame, window in np.argwhere(here >= 0):
            row, column = divmod(int(window), columns)
            at = Person(round(column * CELL * scale), round(row * CELL * scale), width, height)
            found[frame].append(Hit(at, float(here[frame, window])))
    return found


def _opencv() -> Any:
    if not hasattr(cv2, "HOGDescriptor"):
        raise RuntimeError(f"OpenCV {cv2.__version__} has no people detector: pip install 'opencv-python-headless<5'")
    detector = cv2.HOGDescriptor()
    detector.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    return detector


class _Classifier(NamedTuple):
    """What the array code multiplies by.

    Attributes:
        weights: ``(features of a block, blocks of a window)``, blocks column by column.
        bias: Added to the sum.
        spread: How much a pixel of a cell counts in the cells of a block that it lies in, along one side,
            ``(4, CELL)``. A block is two cells wide; rows are (first, first), (first, second), (second, first),
            (second, second), read as "a pixel of this cell in the histogram of that one". Pixels count less far from
            the middle of the block, and in both cells between their middles.
    """

    weights: Any
    bias: float
    spread: Any


def _classifier(xp: ModuleType) -> _Classifier:
    weights = np.ravel(cv2.HOGDescriptor_getDefaultPeopleDetector())
    pixels = np.arange(2 * CELL)
    near = np.exp(-((pixels - CELL) ** 2) / (2 * (CELL / 2) ** 2))
    middles = CELL * (np.arange(2)[:, None] + 0.5)
    shares = near * np.maximum(0, 1 - np.abs(pixels + 0.5 - middles) / CELL)
    return _Classifier(
        xp.asarray(weights[:-1].reshape(BLOCKS[0] * BLOCKS[1], -1).T.copy()),
        float(weights[-1]),
        xp.asarray(np.concatenate([shares[:, :CELL], shares[:, CELL:]]), dtype=xp.float32),
    )


def _scales(height: int, width: int) -> list[tuple[float, tuple[int, int]]]:
    """By how much a frame shrinks, and to what size, as long as a window fits in."""
    scales = []
    scale, size = 1.0, (height, width)
    while size[0] >= WINDOW[0] and size[1] >= WINDOW[1]:
        scales.append((scale, size))
        scale *= STEP
        size = round(height / scale), round(width / scale)
    return scales


def _resized(images: Any, height: int, width: int, xp: ModuleType) -> Any:
    """Bilinear with weights in 256ths and rounded to whole numbers, as OpenCV's exact one; single precision."""
    if images.shape[1:3] == (height, width):
        return images.astype(xp.float32)
    left, across = _between(images.shape[2], width, xp)
    upper, down = _between(images.shape[1], height, xp)
    across, down = across[:, None], down[:, None, None]
    wide = images[:, :, left] * (1 - across) + images[:, :, left + 1] * across
    return xp.floor(wide[:, upper] * (1 - down) + wide[:, upper + 1] * down + 0.5)


def _between(source: int, target: int, xp: ModuleType) -> tuple[Any, Any]:
    """Of each target pixel: the source pixel before it, and the weight of the one after that."""
    at = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    before = np.minimum(at.astype(np.int64), source - 2)
    return xp.asarray(before), xp.asarray(np.round((at - before) * 256) / 256, dtype=xp.float32)


def _scores(images: Any, classifier: _Classifier, xp: ModuleType) -> Any:
    """How sure the classifier is of each window, ``(frames, rows, columns)``: a person at 0 and above."""
    blocks = _blocks(_cells(images, xp), classifier.spread, xp)
    n, rows, columns, features = blocks.shape
    # what each block adds to a window where it is this or that part of it
    parts = (blocks.reshape(-1, features) @ classifier.weights).reshape(n, rows, columns, -1)
    s, down, right, part = parts.strides
    high, wide = BLOCKS
    windows = xp.lib.stride_tricks.as_strided(
        parts,
        (n, rows - high + 1, columns - wide + 1, wide, high),
        (s, down, right, right + high * part, down + part),
    )
    return windows.sum(axis=(3, 4)) + xp.float32(classifier.bias)


def _cells(images: Any, xp: ModuleType) -> Any:
    """How strong the gradients are in each direction: ``(frames, BINS, height, width)``, in whole cells."""
    light = xp.sqrt(images)
    dx, dy = xp.zeros_like(light), xp.zeros_like(light)
    dx[:, :, 1:-1] = light[:, :, 2:] - light[:, :, :-2]
    dy[:, 1:-1] = light[:, 2:] - light[:, :-2]
    strength = dx * dx + dy * dy
    colour = xp.argmax(strength[..., ::-1], axis=-1)[..., None]  # the strongest one; red where they are equal
    dx, dy, strength = (
        xp.take_along_axis(of_colours[..., ::-1], colour, axis=-1)[..., 0] for of_colours in (dx, dy, strength)
    )
    height, width = (side - side % CELL for side in strength.shape[1:])
    turn = (xp.arctan2(dy, dx) * (BINS / np.pi) - 0.5)[:, None, :height, :width] % BINS
    off = xp.abs(turn - xp.arange(BINS, dtype=xp.float32)[:, None, None])
    shares = xp.maximum(0, 1 - xp.minimum(off, BINS - off))  # a direction counts in the two bins beside it
    return shares * xp.sqrt(strength)[:, None, :height, :width]


def _blocks(cells: Any, spread: Any, xp: ModuleType) -> Any:
    """Normalised histograms of each block, ``(frames, rows, columns, 2 * 2 * BINS)``, in the classifier's order."""
    n, _, height, width = cells.shape
    rows, columns = height // CELL, width // CELL
    across = (cells.reshape(-1, CELL) @ spread.T).reshape(n * BINS * rows, CELL, columns * 4)
    sums = (spread @ across).reshape(n, BINS, rows, 2, 2, columns, 2, 2)  # place, cell; place, cell
    blocks = sum(
        sums[:, :, i : rows - 1 + i, i, :, j : columns - 1 + j, j] for i in (0, 1) for j in (0, 1)
    )  # (n, BINS, rows - 1, 2, columns - 1, 2)
    features = xp.ascontiguousarray(blocks.transpose(0, 2, 4, 5, 3, 1)).reshape(n, rows - 1, columns - 1, -1)
    features /= _length(features, xp) + features.shape[-1] * xp.float32(0.1)
    features = xp.minimum(features, 0.2)
    return features / (_length(features, xp) + xp.float32(1e-3))


def _length(features: Any, xp: ModuleType) -> Any:
    return xp.sqrt((features * features).sum(axis=-1, keepdims=True))
