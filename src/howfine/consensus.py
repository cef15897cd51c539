"""Scores that weigh words by how the references of a whole split use them: NIST and CIDEr-D.

All functions take tokens: `predictions` holds a tuple of them for each example, `references` one or
more such tuples for each. The weights come from the references of all examples given, and stay as
they are when examples are resampled: a resample asks how other examples would have scored, not how
much other words would have been worth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Tokens = tuple[str, ...]
References = Sequence[Tokens]

# The longest n-grams that are counted.
NIST_ORDERS, CIDER_ORDERS = 5, 4
# Width of CIDEr-D's penalty on lengths that differ, in tokens.
SIGMA = 6.0


def nist_statistics(predictions: Sequence[Tokens], references: Sequence[References]) -> np.ndarray:
    """(n, 12) statistics of which `nist` takes the sums.

    The columns: bits of information won by n-grams of 1 to 5 tokens, n-grams predicted of 1 to 5
    tokens, and the lengths of the references chosen and of the prediction, over the five orders.
    """
    information = _information(references)
    rows = [
        _nist_row(prediction, several, information)
        for prediction, several in zip(predictions, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * NIST_ORDERS + 2)


def nist(sums: np.ndarray) -> float:
    """NIST-5 of Doddington (2002, equation 3) from (12,) summed statistics.

    An order of which no n-gram was predicted adds nothing, where nltk divides by zero; empty
    references alone score 0.0.
    """
    from nltk.translate.nist_score import nist_length_penalty

    won, said = sums[:NIST_ORDERS], sums[NIST_ORDERS : 2 * NIST_ORDERS]
    meant_length, said_length = sums[2 * NIST_ORDERS :].tolist()
    if not meant_length:
        return 0.0
    of_orders = np.divide(won, said, out=np.zeros(NIST_ORDERS), where=said > 0)
    return float(of_orders.sum() * nist_length_penalty(meant_length, said_length))


def _grams(tokens: Tokens, order: int) -> Iterator[Tokens]:
    return zip(*(tokens[start:] for start in range(order)), strict=False)


def _information(references: Sequence[References]) -> dict[Tokens, float]:
    """Bits that each n-gram's last token adds to those before it (Doddington 2002, equation 2)."""
    counts: Counter[Tokens] = Counter()
    words = 0
    for reference in (reference for several in references for reference in several):
        words += len(reference)
        for order in range(1, NIST_ORDERS + 1):
            counts.update(_grams(reference, order))
    # Before a single token stand no others: it is one of all words.
    return {gram: math.log(counts.get(gram[:-1], words) / n, 2) for gram, n in counts.items()}


def _nist_row(
    prediction: Tokens, references: References, information: dict[Tokens, float]
) -> list[float]:
    """One example's statistics. Each order chooses its own reference, and adds its length."""
    won, said, length = [], [], 0
    for order in range(1, NIST_ORDERS + 1):
        grams = Counter(_grams(prediction, order))
        total = grams.total()
        found = []
        for reference in references:
            there = Counter(_grams(reference, order))
            bits = sum(
                information[gram] * min(count, there[gram])
                for gram, count in grams.items()
                if gram in there
            )
            # Equal gains go to the longest reference: nltk's choice, kept to score as it does.
            found.append((bits / total if total else 0.0, bits, len(reference)))
        _, bits, chosen = max(found)
        won.append(bits)
        said.append(total)
        length += chosen
    return [*won, *said, length, NIST_ORDERS * len(prediction)]


class _Weighed(NamedTuple):
    """A text as CIDEr sees it: one vector of weights for each order, and its length."""

    vectors: list[dict[Tokens, float]]
    norms: list[float]
    # Bigrams, not tokens: pycocoevalcap's count, which differs only for empty texts.
    length: int


def cider_scores(predictions: Sequence[Tokens], references: Sequence[References]) -> np.ndarray:
    """(n,) CIDEr-D from 0 to 10 of each example (Vedantam et al. 2015, section 6).

    The document frequency of an n-gram is the number of examples with it in some reference. An
    n-gram in all of them weighs nothing; of a single example that is every one, and it scores 0.0.
    """
    documents = Counter(
        gram
        for several in references
        for gram in {
            gram
            for reference in several
            for order in range(1, CIDER_ORDERS + 1)
            for gram in _grams(reference, order)
        }
    )
    of_all = math.log(max(1, len(references)))

    def weighed(tokens: Tokens) -> _Weighed:
        vectors = [
            {
                # An n-gram of no reference weighs as one of a single example.
                gram: count * (of_all - math.log(max(1, documents[gram])))
                for gram, count in Counter(_grams(tokens, order)).items()
            }
            for order in range(1, CIDER_ORDERS + 1)
        ]
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return _Weighed(vectors, norms, max(len(tokens) - 1, 0))

    scores = []
    for prediction, several in zip(predictions, references, strict=True):
        said = weighed(prediction)
        alike = [_likeness(said, weighed(reference)) for reference in several]
        scores.append(10 * sum(alike) / len(alike))
    return np.array(scores, dtype=np.float64)


def _likeness(said: _Weighed, meant: _Weighed) -> float:
    """Mean over the orders of clipped cosines, 0 to 1, less where the lengths differ."""
    cosines = 0.0
    for order, vector in enumerate(said.vectors):
        other, norms = meant.vectors[order], said.norms[order] * meant.norms[order]
        if norms:
            product = sum(
                min(weight, other[gram]) * other[gram]
                for gram, weight in vector.items()
                if gram in other
            )
            cosines += product / norms
    gap = said.length - meant.length
    return cosines / CIDER_ORDERS * math.exp(-(gap**2) / (2 * SIGMA**2))
