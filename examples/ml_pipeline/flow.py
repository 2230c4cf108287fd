"""Handwritten digits: augment and project (PCA), train a forest in shards, merge the shards, test the forest.

``stock`` is a plain Prefect flow; the decorator at the end is all that prefect_slo asks for. Every task uses the cores
that its worker was given, so both more workers and larger ones make the flow faster.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prefect import flow, task, unmapped
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import train_test_split

from prefect_slo import slo

Array = NDArray[np.float32]

SIDE = 16  # digits come as 8 x 8; twice that leaves room to rotate and shift them
TREES = 40
SHARDS = 8
VIEWS = 54  # of each test digit


class Features(NamedTuple):
    """What ``pca`` hands on: rows to train and to validate on, and how to project a new image.

    Arrays of 3 MB together at scale 1. They travel to the workers by value: that is a millisecond or two, and the flow
    then needs no storage that all workers reach. Images themselves are made where they are needed.
    """

    train: Array
    train_labels: NDArray[np.uint8]
    valid: Array
    valid_labels: NDArray[np.uint8]
    mean: Array
    components: Array


@task
def pca(scale: float = 1.0) -> Features:
    """Augment the training digits, and project the images on their principal components.

    Args:
        scale: Multiplies the number of images; the time of every stage grows about in proportion.
    """
    train, valid, _ = digits()
    images = distorted(*train, copies=max(1, round(8 * scale)), seed=1)
    checks = distorted(*valid, copies=max(1, round(44 * scale)), seed=2)
    model = PCA(n_components=40, svd_solver="full").fit(images[0])
    return Features(
        model.transform(images[0]).astype(np.float32), images[1],
        model.transform(checks[0]).astype(np.float32), checks[1],
        model.mean_.astype(np.float32), model.components_.astype(np.float32),
    )  # fmt: skip


@task
def train(shard: int, features: Features, trees: int = TREES // SHARDS) -> RandomForestClassifier:
    """One shard of the forest: ``trees`` trees with seeds of their own."""
    forest = RandomForestClassifier(trees, max_features=0.4, min_samples_leaf=4, random_state=shard, n_jobs=cores())
    return forest.fit(features.train, features.train_labels)


@task
def merge(features: Features, shards: list[RandomForestClassifier]) -> RandomForestClassifier:
    """One forest of the better half of all trees, chosen one by one so that their joint vote is right most often."""
    trees = [tree for shard in shards for tree in shard.estimators_]
    kept: list[int] = []
    with ThreadPoolExecutor(cores()) as pool:
        votes = list(pool.map(lambda tree: tree.predict_proba(features.valid), trees))
        total = np.zeros_like(votes[0])
        for _ in range(len(trees) // 2):
            rest = [i for i in range(len(trees)) if i not in kept]
            right = partial(_share_right, total, labels=features.valid_labels)
            kept.append(rest[int(np.argmax(list(pool.map(right, [votes[i] for i in rest]))))])
            total += votes[kept[-1]]
    forest = copy(shards[0])
    forest.estimators_ = [trees[i] for i in kept]
    forest.n_estimators = len(kept)
    return forest


@task
def test(features: Features, forest: RandomForestClassifier) -> float:
    """Accuracy on digits never seen: each is shown in several distorted views, and the views vote."""
    images, labels = distorted(*digits()[2], copies=VIEWS, seed=3)
    votes = copy(forest).set_params(n_jobs=cores()).predict_proba((images - features.mean) @ features.components.T)
    votes = votes.reshape(VIEWS, -1, votes.shape[1]).mean(axis=0)
    return float(np.mean(votes.argmax(axis=1) == labels[: len(votes)]))


def digits() -> tuple[tuple[Array, NDArray[np.uint8]], ...]:
    """Scikit-learn's 1,797 digits as images of ``SIDE`` x ``SIDE``: three parts, to train, validate and test."""
    images, labels = load_digits(return_X_y=True)
    zoom = SIDE / 8
    images = ndimage.zoom(images.reshape(-1, 8, 8) / 16.0, (1, zoom, zoom), order=1).astype(np.float32)
    labels = labels.astype(np.uint8)
    rest, test_images, rest_labels, test_labels = train_test_split(
        images, labels, test_size=400, random_state=0, stratify=labels
    )
    train_images, valid_images, train_labels, valid_labels = train_test_split(
        rest, rest_labels, test_size=300, random_state=0, stratify=rest_labels
    )
    return (train_images, train_labels), (valid_images, valid_labels), (test_images, test_labels)


def distorted(images: Array, labels: NDArray[np.uint8], *, copies: int, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """``copies`` of every image, each turned, slanted and shifted at random, as rows of pixels; copy by copy.

    The same on any number of cores, for all the randomness is drawn before the work is divided.
    """
    rng = np.random.default_rng(seed)
    n = copies * len(images)
    turns = np.eye(2) + rng.normal(0, 0.12, (n, 2, 2))
    shifts = rng.normal(0, 0.8, (n, 2))
    middle = (SIDE - 1) / 2
    pixels = np.indices((SIDE, SIDE)).reshape(2, -1) - middle

    def chunk(rows: NDArray[np.int64]) -> Array:
        at = np.clip(turns[rows] @ pixels + shifts[rows, :, None] + middle, 0, SIDE - 1)
        at[:, 0] += SIDE * np.arange(len(rows))[:, None]
        column = images[rows % len(images)].reshape(-1, SIDE)  # one below the other: one call of scipy, free of the GIL
        return ndimage.map_coordinates(column, at.transpose(1, 0, 2), order=3, prefilter=False)

    with ThreadPoolExecutor(cores()) as pool:
        made = list(pool.map(chunk, np.array_split(np.arange(n), max(1, n // 500))))
    return np.concatenate(made).astype(np.float32), np.tile(labels, copies)


def _share_right(total: Array, votes: Array, labels: NDArray[np.uint8]) -> float:
    return float(np.mean((total + votes).argmax(axis=1) == labels))


def cores() -> int:
    """Cores that this process may use: what a worker of its size was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@flow(name="ml-pipeline")
def stock(scale: float = 1.0) -> float:
    """Train and test a digit classifier; returns its accuracy."""
    features = pca.submit(scale)
    shards = train.map(range(SHARDS), features=unmapped(features))
    forest = merge.submit(features, shards)
    return test.submit(features, forest).result()


ml_pipeline = slo(latency="5s")(stock)

if __name__ == "__main__":
    print(f"accuracy {ml_pipeline():.3f}")
