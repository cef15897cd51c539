"""Scores of texts: equal to the libraries', to their equations, and to themselves resampled."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.nist_score import corpus_nist, nist_length_penalty
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from howfine import consensus, metrics, text_metrics
from howfine.errors import SettingError, TaskError
from howfine.metrics import METRICS, Metric, bootstrap_interval, paired_bootstrap

WRITTEN = {name: metric for name, metric in METRICS.items() if metric.kind == "generation"}
# Those whose weights don't depend on the other examples of a split.
ANSWERS = ("token_f1", "exact_match")
ALONE = {name: WRITTEN[name] for name in ("bleu", "chrf", "rouge_l", "meteor", *ANSWERS)}
LEXICON = (
    "The the a Eagle Mill is in it's near city, riverside. cheap cheaply cheaper food foods "
    "pub pubs serves serving Italian £20 & 5-star"
)
WORDS = LEXICON.split()

SAID = (
    "The Eagle is a cheap coffee shop near Burger King.",
    "Loch Fyne serves French food at a low price and is family friendly.",
    "Zizzi's in the riverside area, isn't it?",
    "",
    "Near the river there is a pub named The Mill, it has English food.",
)
MEANT = (
    (
        "The Eagle is a cheap coffee shop near the Burger King.",
        "A coffee shop near Burger King, The Eagle, is cheap.",
        "The Eagle: low prices, coffee, near Burger King",
    ),
    ("Loch Fyne is a family friendly place that serves French food at low prices.",),
    ("Zizzi's is in the riverside area.", "By the riverside is Zizzi's."),
    ("The Punter is a pub.", "There is a pub called The Punter in the riverside area."),
    (
        "The Mill is a pub near the river that has English food.",
        "Near the river there is a pub, The Mill. It has English food.",
    ),
)


def array(values: Iterable[object]) -> np.ndarray:
    return np.fromiter(values, dtype=object)


def split(n: int, seed: int, references: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Random texts, and one to four references of each: the text with some words exchanged."""
    rng = np.random.default_rng(seed)

    def near(words: list[str]) -> str:
        return " ".join(str(rng.choice(WORDS)) if rng.random() < 0.4 else w for w in words)

    said, meant = [], []
    for _ in range(n):
        words = [str(word) for word in rng.choice(WORDS, rng.integers(1, 16))]
        said.append(near(words))
        meant.append(tuple(near(words) for _ in range(rng.integers(1, references + 1))))
    return array(said), array(meant)


def streams(meant: Collection[tuple[str, ...]]) -> list[Any]:
    """References as sacrebleu takes them: the n-th of each example, None where it has fewer."""
    most = max(map(len, meant))
    return [[several[k] if k < len(several) else None for several in meant] for k in range(most)]


def tokens(text: str) -> tuple[str, ...]:
    return tuple(Tokenizer13a()(text.lower()).split())


def slow_cider(said: np.ndarray, meant: np.ndarray) -> list[float]:
    """CIDEr-D as written in Vedantam et al. (2015), equations 1, 4 and 5, one sum after another."""

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        words = tokens(text)
        return [words[i : i + n] for i in range(len(words) - n + 1)]

    def weight(gram: tuple[str, ...], text: str) -> float:
        images = sum(any(gram in grams(r, len(gram)) for r in several) for several in meant)
        return grams(text, len(gram)).count(gram) * math.log(len(meant) / max(1, images))

    def norm(text: str, n: int) -> float:
        return math.sqrt(sum(weight(gram, text) ** 2 for gram in set(grams(text, n))))

    def cosine(c: str, r: str, n: int) -> float:
        top = sum(min(weight(g, c), weight(g, r)) * weight(g, r) for g in set(grams(c, n)))
        bottom = norm(c, n) * norm(r, n)
        return top / bottom if bottom else 0.0

    found = []
    for c, several in zip(said, meant, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            for r in several:
                gap = len(tokens(c)) - len(tokens(r))
                total += 10 * math.exp(-(gap**2) / (2 * 6**2)) * cosine(c, r, n) / len(several)
        found.append(total / 4)
    return found


# ---- equal to the libraries and to the equations


@pytest.mark.parametrize(("n", "seed"), [(40, 0), (40, 1), (7, 2), (1, 3)])
def test_bleu_and_chrf_are_sacrebleus(n: int, seed: int) -> None:
    said, meant = split(n, seed)
    bleu = sacrebleu.corpus_bleu(list(said), streams(meant)).score
    chrf = sacrebleu.corpus_chrf(list(said), streams(meant)).score
    assert WRITTEN["bleu"].function(said, meant) == bleu
    assert WRITTEN["chrf"].function(said, meant) == chrf


def test_bleu_and_chrf_of_sentences() -> None:
    assert WRITTEN["bleu"].function(array(SAID), array(MEANT)) == pytest.approx(
        sacrebleu.corpus_bleu(SAID, streams(MEANT)).score, abs=0
    )
    # Case counts, and the full stop is a token of its own.
    upper = array(text.upper() for text in SAID)
    assert WRITTEN["bleu"].function(upper, array(MEANT)) < 10
    spaced = array(text.replace(".", " .") for text in SAID)
    assert WRITTEN["bleu"].function(spaced, array(MEANT)) == WRITTEN["bleu"].function(
        array(SAID), array(MEANT)
    )


def test_rouge_l_is_the_best_references() -> None:
    said, meant = split(30, 4)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    each = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in several)
        for text, several in zip(said, meant, strict=True)
    ]
    assert WRITTEN["rouge_l"].function(said, meant) == pytest.approx(100 * np.mean(each), abs=1e-12)


@pytest.mark.parametrize(
    ("said", "meant", "score"),
    [
        ("привет мир", "Привет, мир!", 100.0),
        ("这是一个摘要", "这是一个摘要。", 100.0),
        ("这是二个摘要", "这是一个摘要", 100 * 5 / 6),  # character by character
        ("हिन्दी में है", "हिन्दी में था", 100 * 2 / 3),  # vowel signs stay in their words
        ("cafe\u0301 walks", "caf\u00e9 walking", 100.0),  # one spelling; English stems
        ("it is naïve", "it is naive", 100 * 4 / 7),  # rouge-score's tokens: na, ve
        ("a ❤\ufe0f heart", "a heart", 100.0),  # a mark is no word
        ("мир", "world", 0.0),
        ("Tout, déjà", "déjà vu", 50.0),
    ],
)
def test_rouge_l_reads_every_script(said: str, meant: str, score: float) -> None:
    found = WRITTEN["rouge_l"].function(array([said]), array([(meant,)]))
    assert found == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(("n", "seed"), [(40, 5), (9, 6)])
def test_nist_is_nltks(n: int, seed: int) -> None:
    said, meant = split(n, seed)
    expected = corpus_nist(
        [[tokens(reference) for reference in several] for several in meant],
        [tokens(text) for text in said],
    )
    assert expected > 1
    assert WRITTEN["nist"].function(said, meant) == pytest.approx(expected, abs=1e-9)


def test_nist_of_a_resample_keeps_the_splits_weights() -> None:
    """Doddington's equations 2 and 3, with the counts of a split and the overlaps of a resample."""
    said, meant = split(12, 7)
    counts: Counter[tuple[str, ...]] = Counter()
    for reference in (tokens(reference) for several in meant for reference in several):
        counts.update(reference[i : i + n] for n in range(6) for i in range(len(reference) - n + 1))
        counts[()] -= 1  # as many empty n-grams as words
    rows = np.array([0, 0, 3, 5, 11, 11, 11, 2])
    score, length, meant_length = 0.0, 0, 0
    for n in range(1, 6):
        won, total = 0.0, 0
        for text, several in zip(said[rows], meant[rows], strict=True):
            words = tokens(text)
            ours = Counter(words[i : i + n] for i in range(len(words) - n + 1))
            best = (-1.0, 0)
            for reference in map(tokens, several):
                theirs = Counter(reference[i : i + n] for i in range(len(reference) - n + 1))
                bits = sum(
                    math.log2(counts[gram[:-1]] / counts[gram]) * count
                    for gram, count in (ours & theirs).items()
                )
                best = max(best, (bits, len(reference)))
            won, total = won + best[0], total + ours.total()
            length, meant_length = length + len(words), meant_length + best[1]
        score += won / total
    expected = score * nist_length_penalty(meant_length, length)
    nist = WRITTEN["nist"]
    assert nist.statistics is not None
    found = nist.resampled(nist.statistics(said, meant)[rows][None])
    assert found == pytest.approx([expected], abs=1e-9)


def test_cider_is_its_equations() -> None:
    said, meant = split(8, 8, references=3)
    each = slow_cider(said, meant)
    assert min(each) < max(each)
    np.testing.assert_allclose(text_metrics.statistics("cider", said, meant)[:, 0], each, atol=1e-9)
    assert WRITTEN["cider"].function(said, meant) == pytest.approx(np.mean(each), abs=1e-9)


def test_cider_is_pycocoevalcaps() -> None:
    """Made by pycocoevalcap 1.2, from the tokens of SAID and MEANT (13a, lower case) in its words:

    scorer = pycocoevalcap.cider.cider_scorer.CiderScorer(n=4, sigma=6.0), then for each example
    scorer += (" ".join(said), [" ".join(reference) for ...]), and last scorer.compute_score().
    """
    golden = [5.048398014722356, 3.574595668125658, 1.7622784951950727, 0.0, 5.088447843231511]
    found = text_metrics.statistics("cider", SAID, MEANT)[:, 0]
    np.testing.assert_allclose(found, golden, atol=1e-12)
    assert WRITTEN["cider"].function(array(SAID), array(MEANT)) == pytest.approx(
        3.0947440042549195, abs=1e-12
    )


def test_meteor_counts_equal_words_then_equal_stems() -> None:
    def meteor(text: str, *references: str) -> float:
        return WRITTEN["meteor"].function(array([text]), array([references]))

    long = "the quick brown fox jumps over the lazy dog and runs away"
    # Lavie and Agarwal (2007): one chunk of m words costs 0.5 (1 / m) ** 3.
    assert meteor(long, long) == pytest.approx(100 * (1 - 0.5 / 12**3))
    assert meteor(long.title(), long.upper()) == meteor(long, long)
    assert meteor("the cats sat", "the cat sat") == pytest.approx(100 * (1 - 0.5 / 3**3))
    # Precision and recall of 2/3, two chunks of one word each: no synonym is known.
    assert meteor("a big dog", "a large dog") == pytest.approx(100 / 3)
    # Precision 2/2 and recall 2/4, F = P R / (0.9 P + 0.1 R), one chunk of two.
    f = 0.5 / (0.9 + 0.05)
    assert meteor("a dog", "a dog sat down") == pytest.approx(100 * f * (1 - 0.5 / 2**3))
    assert meteor("a dog", "no match", "a dog sat down", "a") == meteor("a dog", "a dog sat down")


# ---- what holds for all of them


@pytest.mark.parametrize(
    ("said", "meant", "f1", "exact"),
    [
        ("The Eagle.", ("eagle",), 100, 100),
        ("at ten o'clock", ("ten",), 50, 0),
        ("at ten", ("at eleven", "At ten, an hour after nine"), 200 * 2 / 7, 0),
        ("no no no", ("no",), 50, 0),
        ("c b", ("b c",), 100, 0),
        ("", ("no",), 0, 0),
        ("A", ("a",), 100, 100),
        ("B", ("A",), 0, 0),
        ("The", ("a",), 0, 0),
        ("theatre", ("atre",), 0, 0),
    ],
)
def test_answers_are_compared_by_words(
    said: str, meant: tuple[str, ...], f1: float, exact: float
) -> None:
    """As SQuAD's script: no capitals, signs or articles; the best of all references."""
    assert WRITTEN["token_f1"].function(array([said]), array([meant])) == pytest.approx(f1)
    assert WRITTEN["exact_match"].function(array([said]), array([meant])) == exact


@pytest.mark.parametrize("name", WRITTEN)
def test_the_rows_of_the_table(name: str) -> None:
    metric = METRICS[name]
    assert metric.greater_is_better
    assert metric.also == (tuple(WRITTEN)[1:] if name == "bleu" else ("bleu",))
    assert set(WRITTEN) == {"bleu", "chrf", "rouge_l", "meteor", "nist", "cider", *ANSWERS}


@pytest.mark.parametrize("metric", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(("n", "seed"), [(25, 0), (3, 1), (1, 2)])
def test_the_identity_draw_is_the_score(metric: Metric, n: int, seed: int) -> None:
    said, meant = split(n, seed)
    assert metric.statistics is not None
    found = metric.statistics(said, meant)
    assert found.shape[0] == n
    assert found.ndim == 2
    rows = np.stack([np.arange(n), np.arange(n)[::-1]])
    expected = [metric.function(said, meant)] * 2
    np.testing.assert_allclose(metric.resampled(found[rows]), expected, atol=1e-9)


@pytest.mark.parametrize("metric", ALONE.values(), ids=ALONE)
def test_a_resample_scores_as_its_examples_would(metric: Metric) -> None:
    said, meant = split(20, 9)
    rows = np.random.default_rng(0).integers(20, size=(8, 20))
    each = [metric.function(said[row], meant[row]) for row in rows]
    assert metric.statistics is not None
    found = metric.resampled(metric.statistics(said, meant)[rows])
    np.testing.assert_allclose(found, each, atol=1e-9)


@pytest.mark.parametrize("metric", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (["", ""], [("a b c d e f",), ("x", "y z")]),
        (["", ""], [("",), ("", "")]),
        (["a b c d e f", "g"], [("",), ("",)]),
        ([" \n\t", "."], [("...",), ("…",)]),
        (["q r s t u v", "w"], [("a b c d e f",), ("x", "y z")]),
    ],
    ids=["nothing said", "nothing at all", "nothing meant", "signs", "nothing in common"],
)
def test_nothing_to_count_scores_nothing(
    metric: Metric, said: list[str], meant: list[tuple[str, ...]]
) -> None:
    arrays = array(said), array(meant)
    found = metric.function(*arrays)
    if metric.name == "chrf" and meant[0] == ("...",):
        assert 0 <= found <= 100
    else:
        assert found == 0.0
    assert np.isfinite(bootstrap_interval(metric, [arrays[0]], arrays[1], draws=20)).all()


def test_nist_of_short_texts_counts_the_orders_there_are() -> None:
    said, meant = array(["the cat", "a dog"]), array([("the cat", "cat"), ("one dog",)])
    # 6 words in all references: the, cat, cat, one, dog. "the cat" wins log2(5) + log2(5 / 2) and
    # then log2(1 / 1); "a dog" log2(5). Single words: 4 said. Pairs add nothing, longer ones 0 / 0.
    won = (math.log2(5) + math.log2(5 / 2) + math.log2(5)) / 4
    # Both texts and all references chosen have two words.
    assert WRITTEN["nist"].function(said, meant) == pytest.approx(won)


def test_an_empty_prediction_scores_beside_others() -> None:
    said, meant = split(10, 11)
    for metric in WRITTEN.values():
        less = said.copy()
        less[4] = ""
        whole = metric.function(said, meant)
        assert metric.function(less, meant) > 0
        # That one was like no reference to the letter.
        assert metric.function(less, meant) < whole or metric.name == "exact_match"


texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
examples = st.lists(
    st.tuples(texts, st.lists(texts, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(examples=examples, seed=st.integers(0, 99))
def test_the_order_of_examples_plays_no_part(
    examples: list[tuple[str, tuple[str, ...]]], seed: int
) -> None:
    said, meant = array(e[0] for e in examples), array(e[1] for e in examples)
    order = np.random.default_rng(seed).permutation(len(said))
    for metric in WRITTEN.values():
        score = metric.function(said, meant)
        assert math.isfinite(score)
        assert metric.function(said[order], meant[order]) == pytest.approx(score, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(examples=examples)
def test_scores_stay_on_their_scales(examples: list[tuple[str, tuple[str, ...]]]) -> None:
    said, meant = array(e[0] for e in examples), array(e[1] for e in examples)
    for name, most in [("bleu", 100), ("chrf", 100), ("rouge_l", 100), ("meteor", 100)]:
        assert 0 <= WRITTEN[name].function(said, meant) <= most + 1e-9
    each = text_metrics.statistics("cider", said, meant)
    assert each.min() >= 0
    assert each.max() <= 10 + 1e-9
    assert WRITTEN["nist"].function(said, meant) >= 0
    # Where nltk has a value, it is this one.
    longest = max(len(tokens(text)) for text in said)
    if longest >= 5 and all(len(tokens(several[0])) for several in meant):
        theirs = [[tokens(reference) for reference in several] for several in meant]
        expected = corpus_nist(theirs, [tokens(text) for text in said])
        assert WRITTEN["nist"].function(said, meant) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    others=st.lists(texts, min_size=3, max_size=3),
    meant=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=4, max_size=9), min_size=3, max_size=3
    ),
)
def test_nothing_beats_the_reference(others: list[str], meant: list[list[str]]) -> None:
    references = [" ".join(words) for words in meant]
    targets = array((reference,) for reference in references)
    # NIST alone has no such law: rare words said often win more than all words said once.
    for metric in (*ALONE.values(), WRITTEN["cider"]):
        best = metric.function(array(references), targets)
        assert metric.function(array(others), targets) <= best + 1e-9
    assert WRITTEN["bleu"].function(array(references), targets) == pytest.approx(100)
    assert WRITTEN["chrf"].function(array(references), targets) == pytest.approx(100)


def test_more_references_never_hurt_the_best() -> None:
    said, meant = split(20, 12)
    more = array((*several, "Quite another text about nothing") for several in meant)
    for name in ("rouge_l", "meteor"):
        assert WRITTEN[name].function(said, more) >= WRITTEN[name].function(said, meant) - 1e-9


# ---- the bootstrap


@pytest.mark.parametrize("block", [2_000_000, 100])
def test_interval_equals_a_plain_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    (one, meant), (two, _) = split(15, 13), split(15, 14)
    rng = np.random.default_rng(7)
    seeds = rng.integers(2, size=(40, 2))
    rows = rng.integers(15, size=(40, 15))
    bleu = METRICS["bleu"].function
    values = [
        np.mean([bleu((one, two)[seed][row], meant[row]) for seed in drawn])
        for drawn, row in zip(seeds, rows, strict=True)
    ]
    found = bootstrap_interval(METRICS["bleu"], [one, two], meant, level=0.9, draws=40, seed=7)
    np.testing.assert_allclose(found, np.percentile(values, [5, 95]), atol=1e-9)


@pytest.mark.parametrize("metric", WRITTEN.values(), ids=WRITTEN)
def test_the_score_lies_in_its_interval(metric: Metric) -> None:
    said, meant = split(60, 15)
    low, high = bootstrap_interval(metric, [said], meant, draws=200)
    assert low < metric.function(said, meant) < high


@pytest.mark.parametrize("metric", WRITTEN.values(), ids=WRITTEN)
def test_paired_bootstrap_of_texts(metric: Metric) -> None:
    said, meant = split(30, 16)
    worse = said.copy()
    worse[::2] = "Nothing"
    assert paired_bootstrap(metric, [said] * 2, [said], meant, margin=0.0, draws=50) == 1.0
    assert paired_bootstrap(metric, [said], [worse], meant, margin=0.0, draws=50) == 1.0
    if metric.name != "exact_match":  # of which random texts have hardly any
        assert paired_bootstrap(metric, [worse], [said], meant, margin=0.01, draws=50) == 0.0


def test_a_bootstrap_counts_each_run_once() -> None:
    counted = []

    def counting(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
        counted.append(predictions)
        return text_metrics.statistics("bleu", predictions, targets)

    said, meant = split(10, 17)
    metric = replace(METRICS["bleu"], statistics=counting)
    paired_bootstrap(metric, [said, said], [said], meant, margin=0.0, draws=300)
    assert len(counted) == 3


def test_statistics_are_kept_and_cant_be_altered() -> None:
    said, meant = split(10, 18)
    found = text_metrics.statistics("bleu", said, meant)
    assert text_metrics.statistics("bleu", list(said), list(meant)) is found
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


# ---- what is refused, and what is not imported


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_no_text_is_refused(name: str) -> None:
    score = METRICS[name].function
    with pytest.raises(TaskError, match="prediction 2 is of type int, expected a text; a readout"):
        score(array(["a", 3]), array([("a",), ("b",)]))
    with pytest.raises(TaskError, match=r"target 1 is \(\), expected a tuple of one or more texts"):
        score(array(["a"]), array([()]))
    with pytest.raises(TaskError, match="target 1 is 'cat', expected .*; put a single reference"):
        score(array(["a"]), array(["cat"]))
    with pytest.raises(TaskError, match=r"target 1 is \('a', None\)"):
        score(array(["a"]), array([("a", None)]))
    with pytest.raises(SettingError, match="found 1 predictions for 2 targets, expected one for"):
        score(array(["a"]), array([("a",), ("b",)]))
    with pytest.raises(SettingError, match="found 0 predictions for 0 targets"):
        score(array([]), array([]))


def test_the_libraries_wait_until_they_are_called() -> None:
    code = (
        "import sys, howfine.metrics; print({'sacrebleu', 'nltk', 'rouge_score'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


def test_consensus_of_nothing_is_zero() -> None:
    assert consensus.nist(np.zeros(12)) == 0.0
    assert consensus.cider_scores([], []).shape == (0,)
    assert consensus.nist_statistics([], []).shape == (0, 12)
