"""Scores of predictions, and the bootstrap that says how far a score can be trusted.

Every metric takes one array of predictions and one of targets, both of shape (n,): class indices
for classification, numbers for regression; see `text_metrics` for generation and `retrieval` for
alignment. More is always better (the mean squared error is negated), and an input
on which a formula is undefined, such as a correlation with constant predictions, scores 0.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn

from howfine import retrieval, text_metrics
from howfine.errors import SettingError

# Elements of one (draws, n, ...) block of resampled rows: bounds the memory of a bootstrap.
BLOCK = 2_000_000
# A vector whose spread is below this share of its mean is constant up to rounding; scipy's own
# bound for its near-constant warning.
CONSTANT = np.finfo(np.float64).eps ** 0.75
# Means of the same scores, summed in another order, may differ by this much.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Metric:
    """A named score, once for a whole split and once for many resamples of it."""

    name: str
    # What it takes: "classification", "regression", "generation" or "alignment".
    kind: str
    # (n,) predictions and (n,) targets -> score.
    function: Callable[[np.ndarray, np.ndarray], float]
    # (draws, n) predictions and targets -> (draws,) scores, each equal to `function` of its row;
    # of a metric with `statistics`, (draws, n, s) of those alone.
    resampled: Callable[..., np.ndarray]
    greater_is_better: bool = True
    # Metrics that are by custom reported beside this one.
    also: tuple[str, ...] = ()
    # (n,) predictions and targets -> (n, s): s numbers of each example, or group drawn as one.
    statistics: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def scores(name: str, predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The named metric and those reported beside it, by name."""
    return {
        each: METRICS[each].function(predictions, targets) for each in (name, *METRICS[name].also)
    }


def bootstrap_interval(
    metric: Metric,
    predictions: Sequence[np.ndarray],
    targets: np.ndarray,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a score (Efron & Tibshirani 1993, chapter 13).

    `predictions` holds one (n,) array per training seed. Each draw resamples the n examples with
    replacement, and the seeds too where there are several; its score is the mean over the drawn
    seeds. Raises SettingError for a level outside (0, 1) or arrays of different lengths.
    """
    if not 0 < level < 1:
        raise SettingError(f"level is {level}, expected a share between 0 and 1, such as 0.95")
    targets = np.asarray(targets)
    runs = _runs(metric, predictions, targets, draws)
    rng = np.random.default_rng(seed)
    weights = _seed_weights(rng, draws, len(runs))
    means = [_scores(metric, runs, targets, rows) for rows in _rows(rng, draws, runs[0])]
    values = (np.concatenate(means) * weights).sum(axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def paired_bootstrap(
    metric: Metric,
    candidate: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    targets: np.ndarray,
    margin: float,
    draws: int = 2000,
    seed: int = 0,
) -> float:
    """Share of draws in which the candidate is no worse than the reference by more than a margin.

    A draw counts when score(candidate) >= score(reference) - margin * |score(reference)|. Each
    draw resamples the examples once for both sides, and each side's seeds by themselves
    (`candidate` and `reference` hold one (n,) array per seed). Raises SettingError for a negative
    margin or arrays of different lengths.
    """
    if margin < 0:
        raise SettingError(f"margin is {margin}, expected a share of the reference's score, >= 0")
    targets = np.asarray(targets)
    sides = [_runs(metric, side, targets, draws) for side in (candidate, reference)]
    rng = np.random.default_rng(seed)
    weights = [_seed_weights(rng, draws, len(runs)) for runs in sides]
    blocks: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for rows in _rows(rng, draws, sides[0][0]):
        for found, runs in zip(blocks, sides, strict=True):
            found.append(_scores(metric, runs, targets, rows))
    ours, theirs = (
        (np.concatenate(found) * weight).sum(axis=1)
        for found, weight in zip(blocks, weights, strict=True)
    )
    return float(np.mean(ours >= theirs - margin * np.abs(theirs) - ROUNDING))


def _runs(
    metric: Metric, predictions: Sequence[np.ndarray], targets: np.ndarray, draws: int
) -> list[np.ndarray]:
    """(n,) predictions of each run, or its statistics where the metric has some."""
    if draws < 1:
        raise SettingError(f"draws is {draws}, expected at least 1")
    if not len(predictions) or not len(targets):
        raise SettingError(
            f"found {len(predictions)} runs on {len(targets)} examples, expected at least one each"
        )
    runs = [np.asarray(run) for run in predictions]
    for number, run in enumerate(runs, 1):
        if run.shape != targets.shape:
            raise SettingError(
                f"run {number} has predictions of shape {run.shape}, expected {targets.shape}: "
                "one for each target (a list holds one array per seed)"
            )
    return [metric.statistics(run, targets) for run in runs] if metric.statistics else runs


def _seed_weights(rng: np.random.Generator, draws: int, seeds: int) -> np.ndarray:
    """(draws, seeds): the share of each seed in each draw's mean."""
    if seeds == 1:
        return np.ones((draws, 1))
    drawn = rng.integers(seeds, size=(draws, seeds))
    return np.stack([(drawn == number).mean(axis=1) for number in range(seeds)], axis=1)


def _rows(rng: np.random.Generator, draws: int, run: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of (draws in this block, n) indices of a run's rows, drawn with replacement."""
    n, step = len(run), max(1, BLOCK // run.size)
    for start in range(0, draws, step):
        yield rng.integers(n, size=(min(step, draws - start), n))


def _scores(
    metric: Metric, runs: list[np.ndarray], targets: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """(draws, seeds): each run's score on each draw's rows."""
    drawn = () if metric.statistics else (targets[rows],)
    return np.stack([metric.resampled(run[rows], *drawn) for run in runs], axis=1)


def _confusion(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(draws, target class, predicted class) counts of (draws, n) class indices."""
    classes = int(max(predictions.max(), targets.max())) + 1
    draws = len(targets)
    cells = (np.arange(draws)[:, None] * classes + targets) * classes + predictions
    counts = np.bincount(cells.ravel().astype(np.int64), minlength=draws * classes**2)
    return counts.reshape(draws, classes, classes)


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, 0.0 where the denominator is 0."""
    out = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape))
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def _accuracies(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (predictions == targets).mean(axis=1)


def _f1_of_classes(predictions: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(draws, classes): F1 = 2 TP / (true + predicted), and its denominator."""
    counts = _confusion(predictions, targets)
    total = counts.sum(axis=1) + counts.sum(axis=2)
    return _divided(2 * counts.diagonal(axis1=1, axis2=2), total), total


def _f1s(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    f1, _ = _f1_of_classes(predictions, targets)
    return f1[:, 1] if f1.shape[1] > 1 else np.zeros(len(f1))


def _macro_f1s(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    f1, total = _f1_of_classes(predictions, targets)
    return f1.sum(axis=1) / (total > 0).sum(axis=1)


def _matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return 0.0
    return float(sklearn.matthews_corrcoef(targets, predictions))


def _matthews_all(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The K-class form of Gorodkin (2004), which for two classes is Matthews' own."""
    counts = _confusion(predictions, targets).astype(np.float64)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    n = targets.shape[1]
    covariance = n * np.trace(counts, axis1=1, axis2=2) - (true * predicted).sum(axis=1)
    spread = (n**2 - (true**2).sum(axis=1)) * (n**2 - (predicted**2).sum(axis=1))
    return _divided(covariance, np.sqrt(spread))


def _centred(values: np.ndarray) -> np.ndarray:
    """(draws, n) values of mean 0 and norm 1; rows of zeros where constant."""
    values = values.astype(np.float64)
    mean = values.mean(axis=-1, keepdims=True)
    values = values - mean
    norm = np.sqrt((values**2).sum(axis=-1, keepdims=True))
    return _divided(values, np.where(norm > CONSTANT * np.abs(mean), norm, 0.0))


def _pearson(predictions: np.ndarray, targets: np.ndarray) -> float:
    if not _centred(predictions).any() or not _centred(targets).any():
        return 0.0
    both = predictions.astype(np.float64), targets.astype(np.float64)
    return float(stats.pearsonr(*both).statistic)


def _pearsons(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.clip((_centred(predictions) * _centred(targets)).sum(axis=1), -1.0, 1.0)


def _spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(targets) == 0:
        return 0.0
    return float(stats.spearmanr(predictions, targets).statistic)


def _spearmans(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return _pearsons(stats.rankdata(predictions, axis=1), stats.rankdata(targets, axis=1))


def _negative_mses(predictions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -((predictions.astype(np.float64) - targets) ** 2).mean(axis=1)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="accuracy",
            kind="classification",
            function=lambda p, t: float(sklearn.accuracy_score(t, p)),
            resampled=_accuracies,
        ),
        # Of class 1, the positive one.
        Metric(
            name="f1",
            kind="classification",
            function=lambda p, t: float(sklearn.f1_score(t, p, zero_division=0.0)),
            resampled=_f1s,
            also=("accuracy",),
        ),
        Metric(
            name="macro_f1",
            kind="classification",
            function=lambda p, t: float(sklearn.f1_score(t, p, average="macro", zero_division=0.0)),
            resampled=_macro_f1s,
            also=("accuracy",),
        ),
        Metric("matthews", "classification", _matthews, _matthews_all, also=("accuracy",)),
        Metric("pearson", "regression", _pearson, _pearsons),
        Metric("spearman", "regression", _spearman, _spearmans),
        # The mean of the two, as GLUE scores STS-B.
        Metric(
            name="pearson_spearman",
            kind="regression",
            function=lambda p, t: (_pearson(p, t) + _spearman(p, t)) / 2,
            resampled=lambda p, t: (_pearsons(p, t) + _spearmans(p, t)) / 2,
            also=("pearson", "spearman"),
        ),
        Metric(
            name="negative_mse",
            kind="regression",
            function=lambda p, t: -float(sklearn.mean_squared_error(t, p)),
            resampled=_negative_mses,
        ),
    )
}

# The first one is reported with all others, and each of those with it.
for _kind, _of in (("generation", text_metrics), ("alignment", retrieval)):
    _first, *_others = _of.FORMULAS
    for _name, _formula in _of.FORMULAS.items():
        METRICS[_name] = Metric(
            *(_name, _kind),
            function=partial(_of.score, _name),
            resampled=_formula.resampled,
            also=tuple(_others) if _name == _first else (_first,),
            statistics=partial(_of.statistics, _name),
        )
