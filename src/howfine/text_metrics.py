"""Scores of written texts against one or more references each, by the libraries of the field.

Predictions are n texts; targets hold, for each of them, a tuple of one or more references, whose
number may differ. Every score comes from a few numbers of each example, its sufficient statistics:
sums of them for BLEU, chrF and NIST, means for the others. A bootstrap resamples those and counts
no n-gram twice. An empty prediction scores as any other does.

The libraries are imported where they are called: nltk alone takes seconds.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from howfine import consensus
from howfine.errors import SettingError, TaskError

# What SQuAD's script takes out of an answer, in lower case, before it compares words.
_SIGNS, _ARTICLES = str.maketrans("", "", string.punctuation), re.compile(r"\b(a|an|the)\b")
# Scripts written without spaces: Thai and Lao, Burmese, Khmer, Japanese, Chinese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# In a text of letters, digits, marks and spaces: one sign of those scripts, or a word of others,
# each with the marks behind it. Marks are no \w.
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|(?:(?![{_UNSPACED}])\w[^\w\s]*)+")
# Splits whose statistics are kept: a score, its interval and its comparisons ask for the same.
KEPT_SPLITS = 64

Texts = tuple[str, ...]
References = tuple[tuple[str, ...], ...]


class Formula(NamedTuple):
    """A score in two halves: what is counted in each example, and what is made of many."""

    # n texts and their references -> (n, s) statistics.
    counted: Callable[[Texts, References], Any]
    # (draws, n, s) resampled statistics -> (draws,) scores.
    resampled: Callable[[np.ndarray], np.ndarray]


def statistics(name: str, predictions: Iterable[str], targets: Iterable[Any]) -> np.ndarray:
    """(n, s) sufficient statistics of the metric `name`, read-only; s depends on the metric.

    Raises SettingError for other numbers of predictions than of targets, or none; TaskError for a
    prediction that is no text and for references that are not one or more texts.
    """
    return _statistics(name, *_checked(list(predictions), list(targets)))


def score(name: str, predictions: Iterable[str], targets: Iterable[Any]) -> float:
    """The metric `name` of a whole split, in its customary scale. Raises as `statistics` does."""
    found = statistics(name, predictions, targets)
    return float(FORMULAS[name].resampled(found[None])[0])


@lru_cache(maxsize=KEPT_SPLITS)
def _statistics(name: str, predictions: Texts, targets: References) -> np.ndarray:
    found = np.asarray(FORMULAS[name].counted(predictions, targets), dtype=np.float64)
    found = found.reshape(len(predictions), -1)
    found.setflags(write=False)  # it is handed out again
    return found


def _checked(predictions: Sequence[Any], targets: Sequence[Any]) -> tuple[Texts, References]:
    if len(predictions) != len(targets) or not len(targets):
        raise SettingError(
            f"found {len(predictions)} predictions for {len(targets)} targets, expected one for "
            "each, and one at least"
        )
    for row, text in enumerate(predictions, 1):
        if not isinstance(text, str):
            raise TaskError(
                f"prediction {row} is of type {type(text).__name__}, expected a text; a readout "
                "that generates gives texts, an empty one where nothing was written"
            )
    for row, several in enumerate(targets, 1):
        # A text is a sequence of texts too: its letters would pass for references.
        texts = isinstance(several, list | tuple) and all(isinstance(t, str) for t in several)
        if not texts or not several:
            raise TaskError(
                f"target {row} is {several!r:.80}, expected a tuple of one or more texts; put a "
                "single reference into a tuple of its own"
            )
    return tuple(map(str, predictions)), tuple(map(tuple, targets))


def _of_sums(formula: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A score that is some formula of (s,) sums, for (draws, n, s) at once."""
    return lambda drawn: np.array([formula(sums) for sums in drawn.sum(axis=1)])


def _of_means(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """A score that is the mean of one number per example, times a scale."""
    return lambda drawn: scale * drawn[:, :, 0].mean(axis=1)


@cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF(char_order=6, word_order=0, beta=2)
    # `force` only silences its warning of full stops that stand apart, as some tasks' own do.
    return BLEU(tokenize="13a", smooth_method="exp", effective_order=False, force=True)


def _sacrebleu_counted(name: str) -> Callable[[Texts, References], list[list[int]]]:
    # Its own significance tests stand on these two methods; nothing public gives chrF's counts.
    # The n-th stream holds every example's n-th reference, None where there is none.
    return lambda predictions, targets: _sacrebleu(name)._extract_corpus_statistics(
        predictions, list(zip_longest(*targets))
    )


def _sacrebleu_score(name: str) -> Callable[[np.ndarray], float]:
    return lambda sums: _sacrebleu(name)._compute_score_from_stats(sums.tolist()).score


class _Words:
    """A tokenizer of rouge-score for any script: words in lower case, the English ones as stems.

    rouge-score's own knows a to z and 0 to 9 alone.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        signs = unicodedata.normalize("NFC", text.lower())
        kept = (s if s.isalnum() or unicodedata.category(s)[0] == "M" else " " for s in signs)
        words = _WORD.findall("".join(kept))
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def _rouge_l(predictions: Texts, targets: References) -> list[float]:
    """By rouge-score's own tokens, but of a reference with letters or digits that it drops."""
    from rouge_score.rouge_scorer import RougeScorer

    plain = RougeScorer(["rougeL"], use_stemmer=True)
    broad = RougeScorer(["rougeL"], tokenizer=_Words())

    def f1(reference: str, text: str) -> float:
        lost = any(sign.isalnum() and not sign.isascii() for sign in reference)
        return float((broad if lost else plain).score(reference, text)["rougeL"].fmeasure)

    pairs = zip(predictions, targets, strict=True)
    return [max(f1(each, text) for each in several) for text, several in pairs]


class _NoSynonyms:
    """Stands in for WordNet, of which machines have one edition, another, or none."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(predictions: Texts, targets: References) -> list[float]:
    from nltk.translate.meteor_score import meteor_score

    pairs = zip(*_tokens(predictions, targets), strict=True)
    return [meteor_score(several, text, wordnet=_NoSynonyms()) for text, several in pairs]


def _nist(predictions: Texts, targets: References) -> np.ndarray:
    return consensus.nist_statistics(*_tokens(predictions, targets))


def _cider(predictions: Texts, targets: References) -> np.ndarray:
    return consensus.cider_scores(*_tokens(predictions, targets))


def _tokens(
    predictions: Texts, targets: References
) -> tuple[list[consensus.Tokens], list[tuple[consensus.Tokens, ...]]]:
    """Words and signs of each text, as BLEU splits them, in lower case."""
    tokenizer = _sacrebleu("bleu").tokenizer

    def split(text: str) -> consensus.Tokens:
        return tuple(tokenizer(text.lower().rstrip()).split())

    return [split(text) for text in predictions], [tuple(map(split, many)) for many in targets]


def _answer(text: str) -> list[str]:
    """The words of an answer, as the scripts of SQuAD and CoQA split it.

    An answer of signs or articles alone, such as the letter A, stays as it is.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split() or text.lower().split()


def _overlap(said: list[str], meant: list[str]) -> float:
    """F1 of words, counted as often as they stand there."""
    both = (Counter(said) & Counter(meant)).total()
    return 2 * both / (len(said) + len(meant)) if both else 0.0


def _same(said: list[str], meant: list[str]) -> float:
    return float(said == meant != [])


def _best(alike: Callable[[list[str], list[str]], float]) -> Callable[[Texts, References], Any]:
    """How far each answer agrees with the reference that is most like it."""
    return lambda predictions, targets: [
        max(alike(_answer(text), _answer(each)) for each in several)
        for text, several in zip(predictions, targets, strict=True)
    ]


# The first is the one by which texts are customarily compared.
FORMULAS = {
    "bleu": Formula(_sacrebleu_counted("bleu"), _of_sums(_sacrebleu_score("bleu"))),
    "chrf": Formula(_sacrebleu_counted("chrf"), _of_sums(_sacrebleu_score("chrf"))),
    "rouge_l": Formula(_rouge_l, _of_means(100.0)),
    "meteor": Formula(_meteor, _of_means(100.0)),
    "nist": Formula(_nist, _of_sums(consensus.nist)),
    "cider": Formula(_cider, _of_means(1.0)),
    "token_f1": Formula(_best(_overlap), _of_means(100.0)),
    "exact_match": Formula(_best(_same), _of_means(100.0)),
}
