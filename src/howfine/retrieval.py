"""Retrieval across two kinds of things, such as pictures and captions: recall at k, both ways.

Predictions are one vector a pair, the picture's direction and the caption's one after the other;
targets say which picture a pair is of. A picture is looked for among all, and so is a caption. A
score that another one equals counts as below it: a model that maps all to one point finds nothing.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from howfine.text_metrics import Formula

KS = (1, 5, 10)
# What is found at which rank, by the name of its score.
NAMES = tuple(f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in KS)
MEAN = "mean_recall"
# Scores of so many pairs at once: bounds the memory.
_BLOCK = 2**24


def as_objects(vectors: np.ndarray) -> np.ndarray:
    """(n, d) vectors as (n,) objects, as a metric takes predictions."""
    found = np.empty(len(vectors), dtype=object)
    found[:] = list(vectors)
    return found


def statistics(name: str, predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(m, 7) of m pictures: its captions' hits at 1, 5, 10, its own, and how many captions it has.

    They are the same for each score of NAMES. A picture and its captions are one, as they are
    drawn together where a score's interval is asked for: what finds one caption of a picture is
    likely to find the others.
    """
    vectors = np.stack(list(predictions)).astype(np.float32)
    _, first, owner = np.unique(targets, return_index=True, return_inverse=True)
    images, texts = np.split(vectors, 2, axis=1)
    caption, picture = ranks(images[first], texts, owner)
    captions = [np.bincount(owner, weights=caption <= k) for k in KS]
    columns = [*captions, *(picture <= k for k in KS), np.bincount(owner)]
    return np.stack(columns, axis=1).astype(np.float64)


def ranks(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """((n,) rank of each text's image, (m,) best rank of a text of each image), from 1.

    `images` (m, d) and `texts` (n, d) are compared by dot products; `owner` (n,) is the image
    that a text belongs to.
    """
    step = max(1, _BLOCK // len(images))
    blocks = [slice(start, start + step) for start in range(0, len(texts), step)]
    others = np.arange(len(images))
    # Sums of the same numbers in another order differ by rounding: what is this near is equal.
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    near = 1e-9 * max(1.0, float(np.abs(images).max() * np.abs(texts).max()) * images.shape[1])
    best = np.full(len(images), -np.inf)
    for rows in blocks:
        own = (texts[rows] @ images.T)[np.arange(len(owner[rows])), owner[rows]]
        np.maximum.at(best, owner[rows], own)
    caption, above = np.zeros(len(texts), int), np.zeros(len(images), int)
    for rows in blocks:
        scores, mine = texts[rows] @ images.T, owner[rows]
        other = others != mine[:, None]
        own = scores[np.arange(len(mine)), mine]
        caption[rows] = 1 + ((scores >= own[:, None] - near) & other).sum(axis=1)
        above += ((scores >= best - near) & other).sum(axis=0)
    return caption, 1 + above


def recall(name: str, found: np.ndarray) -> np.ndarray:
    """(draws,) a score of NAMES, or the mean of them all, from (draws, m, 7) statistics."""
    captions = found[..., :3].sum(axis=-2) / found[..., 6:].sum(axis=-2)
    pictures = found[..., 3:6].mean(axis=-2)
    shares = np.concatenate([captions, pictures], axis=-1)
    made: np.ndarray = shares.mean(axis=-1) if name == MEAN else shares[..., NAMES.index(name)]
    return made


def score(name: str, predictions: np.ndarray, targets: np.ndarray) -> float:
    """A score of NAMES, or their mean, of a whole split."""
    return float(recall(name, statistics(name, predictions, targets)[None])[0])


# The first is the one by which models are compared.
FORMULAS = {
    name: Formula(partial(statistics, name), partial(recall, name)) for name in (MEAN, *NAMES)
}
