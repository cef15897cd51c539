"""Calibration: how far a classifier's confidence can be trusted.

Guo et al. 2017, "On calibration of modern neural networks" (ICML). The confidence of an answer is
the probability given to it, the highest of its row. Answers are put in bins of equal width by
their confidence; bin b of M holds those in ((b - 1) / M, b / M]. The expected calibration error is

    ECE = sum over b of |B_b| / n * |acc(b) - conf(b)|        (their equation 3)

and temperature scaling divides the logits by one T > 0 that minimises the negative log-likelihood
of another split (their section 4.2). With p = softmax(z), softmax(z / T) is p^(1 / T), normalised,
so that probabilities alone are enough. Regression has no calibration.

All functions take probabilities of shape (n, classes) with rows that sum to 1, and class indices of
shape (n,), and raise SettingError for others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from howfine.errors import SettingError

BINS = 15  # as Guo et al.; FEWER is reported beside it, as the error depends on the number
FEWER = 10
# A temperature is sought between these: where every answer is right, the likelihood grows as T
# falls to 0, and where none is better than chance, as T grows without end.
LEAST, MOST = 0.01, 100.0
_DIGITS = 6
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, eq=False)
class Reliability:
    """One entry a bin, lowest confidence first: arrays of shape (bins,); NaN in empty bins."""

    count: np.ndarray
    confidence: np.ndarray  # mean of the bin's answers
    accuracy: np.ndarray  # share of them that is right


def reliability(probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS) -> Reliability:
    """Count, mean confidence and accuracy of each of so many bins of equal width."""
    if bins < 1:
        raise SettingError(f"bins is {bins}, expected at least 1, such as {BINS}")
    confidence, right = _answers(*_checked(probabilities, targets))
    inner = np.arange(1, bins) / bins
    place = np.searchsorted(inner, confidence, side="left")  # the edge belongs to the bin below it
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of an empty bin
        means = [
            np.bincount(place, weights=values, minlength=bins) / count
            for values in (confidence, right)
        ]
    return Reliability(count, *means)


def expected_calibration_error(
    probabilities: np.ndarray, targets: np.ndarray, bins: int = BINS
) -> float:
    """ECE with the confidence of the top label: 0 is perfect, 1 the worst."""
    return _error(reliability(probabilities, targets, bins))


def calibration(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """What a score says of its calibration, as JSON types rounded to six digits.

    `ece` with 15 bins and `ece_10` with 10, mean `confidence`, `accuracy`, `n`, and `reliability`:
    lists of `count`, `confidence` and `accuracy` of the 15 bins, None where a bin is empty.
    """
    table = reliability(probabilities, targets)
    confidence, right = _answers(*_checked(probabilities, targets))
    return {
        "ece": round(_error(table), _DIGITS),
        "ece_10": round(expected_calibration_error(probabilities, targets, FEWER), _DIGITS),
        "confidence": round(float(confidence.mean()), _DIGITS),
        "accuracy": round(float(right.mean()), _DIGITS),
        "n": len(right),
        "reliability": _lists(table),
    }


def pooled(tables: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Several `reliability` entries of `calibration`, of as many runs, as one of all answers."""
    counts = np.array([table["count"] for table in tables])
    means = [
        # In float64 None is NaN, which an empty bin must not spread.
        np.nan_to_num(np.array([table[name] for table in tables], np.float64))
        for name in ("confidence", "accuracy")
    ]
    count = counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return _lists(Reliability(count, *((counts * mean).sum(axis=0) / count for mean in means)))


def temperature(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The T from 0.01 to 100 by which to divide the logits for the least mean -log p(target).

    Above 1 the answers were too sure. The loss is convex in 1 / T, so there is one minimum.
    """
    probabilities, targets = _checked(probabilities, targets)
    logarithms = _logarithms(probabilities)
    # A target of probability 0 counts as the smallest normal number: its loss stays finite.
    rows = np.arange(len(targets))
    logarithms[rows, targets] = np.maximum(logarithms[rows, targets], math.log(_TINY))
    found = minimize_scalar(
        lambda power: _loss(logarithms / math.exp(power), targets),
        bounds=(math.log(LEAST), math.log(MOST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(found.x))


def tempered(probabilities: np.ndarray, value: float) -> np.ndarray:
    """softmax(logits / value): the same shape, the same answers.

    A probability of 0, which an option that an example lacks has, stays 0 at any temperature.
    """
    if not (value > 0 and math.isfinite(value)):
        raise SettingError(f"temperature is {value}, expected a number above 0; 1 changes nothing")
    probabilities = _checked(probabilities)[0]
    return np.exp(_normalised(_logarithms(probabilities) / value))


def _checked(probabilities: np.ndarray, targets: np.ndarray | None = None) -> Any:
    """Both as arrays, the first in float64, if they fit each other."""
    shares = np.asarray(probabilities, np.float64)
    if shares.ndim != 2 or not shares.size:
        raise SettingError(
            f"probabilities have shape {shares.shape}, expected (examples, classes), both above 0"
        )
    odd = ~(np.isclose(shares.sum(axis=1), 1, atol=1e-4) & (shares >= 0).all(axis=1))
    if odd.any():
        row = int(odd.argmax())
        raise SettingError(
            f"row {row} of the probabilities is {shares[row].tolist()[:4]}, expected shares of at "
            "least 0 that sum to 1; take softmax of logits first"
        )
    if targets is None:
        return (shares,)
    labels = np.asarray(targets)
    fits = labels.shape == shares.shape[:1] and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() >= shares.shape[1]:
        raise SettingError(
            f"targets have shape {labels.shape} and type {labels.dtype}, expected "
            f"{shares.shape[0]} class indices below {shares.shape[1]}, one for each row"
        )
    return shares, labels


def _answers(shares: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of each answer, and 1.0 where it is right."""
    return shares.max(axis=1), (shares.argmax(axis=1) == labels).astype(np.float64)


def _error(table: Reliability) -> float:
    gaps = np.nan_to_num(np.abs(table.accuracy - table.confidence))
    return float((table.count * gaps).sum() / table.count.sum())


def _lists(table: Reliability) -> dict[str, list[Any]]:
    means = {"confidence": table.confidence, "accuracy": table.accuracy}
    said = {
        name: [None if math.isnan(value) else round(float(value), _DIGITS) for value in values]
        for name, values in means.items()
    }
    return {"count": [int(count) for count in table.count], **said}


def _logarithms(shares: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, whose softmax is 0 again
        return np.asarray(np.log(shares))


def _normalised(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-_normalised(logits)[np.arange(len(labels)), labels].mean())
