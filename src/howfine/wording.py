"""Wording: numbers and results as people read them, for the report's sentence, tables and plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Metrics in 0..1 that are read as percentages; the others are said with three decimals.
_PERCENT = ("accuracy", "f1", "macro_f1")
_METRICS = {
    "f1": "F1",
    "macro_f1": "macro F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "pearson_spearman": "mean of Pearson and Spearman correlation",
    "negative_mse": "negative mean squared error",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "nist": "NIST",
    "cider": "CIDEr-D",
    "token_f1": "F1 of words",
    "mean_recall": "mean recall",
    **{
        f"{one}_to_{other}_r{k}": f"recall at {k}, {one} to {other}"
        for one, other in (("text", "image"), ("image", "text"))
        for k in (1, 5, 10)
    },
    "exact_match": "exact match",
}
_UNITS = ("bytes", "kB", "MB", "GB", "TB")
# Where a probability stops settling whether the margin holds, and what is said then.
_VERDICTS = (
    (0.95, ""),
    (0.80, ", likely, though {examples} can't prove it"),
    (0.20, ", so {examples} can't say either way"),
    (0.05, ", so it probably is not, though {examples} can't prove that"),
    (0.00, ": chosen on dev, it does not hold on test"),
)


def metric_said(name: str) -> str:
    """A metric's name in words."""
    return _METRICS.get(name, name)


def in_percent(metric: str) -> bool:
    """Whether scores of a metric are read as percentages."""
    return metric in _PERCENT


def score_said(metric: str, score: float) -> str:
    """'81.2 %' for a metric read as a percentage, '0.812' otherwise."""
    return f"{100 * score:.1f} %" if in_percent(metric) else f"{score:.3f}"


def interval_said(metric: str, interval: Sequence[float]) -> str:
    """'[79.0, 83.3]', in the unit of `score_said`."""
    scale, digits = (100, 1) if in_percent(metric) else (1, 3)
    return f"[{', '.join(f'{scale * bound:.{digits}f}' for bound in interval)}]"


def human(size: float) -> str:
    """Bytes in the largest decimal unit that leaves at least one: 11204 is '11.2 kB'."""
    power = 0
    while power < len(_UNITS) - 1 and round(size / 1000**power, 1) >= 1000:
        power += 1
    return f"{size:,.0f} bytes" if not power else f"{size / 1000**power:.1f} {_UNITS[power]}"


def significant(value: float, digits: int = 2) -> str:
    """A number with so many significant digits, in powers of ten only below 1e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = f"{value:.{digits - 1}e}"
    power = int(rounded.partition("e")[2])
    return rounded if power < -6 else f"{float(rounded):,.{max(0, digits - 1 - power)}f}"


def share_said(share: float) -> str:
    """A share as a percentage: '0.012 %', '3.4 %', '100 %'."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{significant(percent)} %"


def percent_said(share: float) -> str:
    """A share as a percentage with one decimal, for a column of them: '3.4 %', '81.0 %'."""
    return f"{100 * share:.1f} %"


def probability_said(probability: float) -> str:
    """Two decimals; never a certainty, which draws can't give."""
    if probability < 0.01:
        return "< 0.01"
    return "> 0.99" if probability > 0.99 else f"{probability:.2f}"


def settings_said(settings: Mapping[str, Any]) -> str:
    """Settings as 'where matrices@-1 · initial sparsity 0.02'; '' where there are none."""
    return " · ".join(
        f"{name.replace('_', ' ')} {_value(value)}" for name, value in settings.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " + ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted(number: int, noun: str) -> str:
    """'1 seed', '1,066 test examples'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def name_said(name: str) -> str:
    """A task's or base's name; of a path from the root, home or here, its last part."""
    if name.startswith(("/", "./", "../", "~")):
        return name.rstrip("/").rpartition("/")[2]
    return name


def margin_said(margin: float) -> str:
    """'1 %'."""
    return f"{100 * margin:g} %"


def ceiling_of(groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The group that all others are held against."""
    return next(group for group in groups if group["role"] == "ceiling")


def ceiling_said(result: Mapping[str, Any]) -> str:
    """The ceiling by name; full fine-tuning only where it did train every parameter."""
    ceiling, whole = ceiling_of(result["groups"]), result["base"]["parameters"]
    # A head comes on top; what trains a gate beside each parameter has twice as many.
    if whole <= ceiling["trainable"] < 1.5 * whole:
        return "full fine-tuning"
    return f"the ceiling {ceiling['recipe']}"


def sentence(result: Mapping[str, Any]) -> str:
    """The answer in one sentence: bytes, score, and what the test set can and can't show.

    `result` is the report without its sentence; see `howfine.report.Report`.
    """
    chosen, metric, against = result["recommended"], result["task"]["metric"], ceiling_said(result)
    ceiling = ceiling_of(result["groups"])
    who = f"{name_said(result['task']['name'])} on {name_said(result['base']['name'])} needs"
    scored = f"{metric_said(metric)} {score_said(metric, chosen['mean_score'])}"
    scored += f" {interval_said(metric, chosen['mean_interval'])}"
    if chosen["key"] in ceiling["keys"]:
        whole = f"{who} the whole {counted(chosen['bytes'], 'byte')} of {against}"
        return f"{whole}: {scored}; {_none_smaller(result, ceiling)}."
    share = f"{share_said(chosen['share_of_full_bytes'])} of {against}'s file"
    examples = counted(result["task"]["sizes"]["test"], "test example")
    (seeds,) = (len(g["seeds"]) for g in result["groups"] if chosen["key"] in g["keys"])
    verdict = next(said for least, said in _VERDICTS if chosen["probability"] >= least)
    return (
        f"{who} {counted(chosen['bytes'], 'byte')} ({share}): {scored} against "
        f"{score_said(metric, ceiling['score'])} for {against}; the probability that it really is "
        f"within {margin_said(result['margin'])} of that is "
        f"{probability_said(chosen['probability'])} (paired bootstrap over {examples} and "
        f"{counted(seeds, 'seed')}){verdict.format(examples=examples)}."
    )


def _none_smaller(result: Mapping[str, Any], ceiling: Mapping[str, Any]) -> str:
    smaller = [group for group in result["groups"] if group["bytes"] < ceiling["bytes"]]
    if not smaller:
        return "no smaller change was measured, so nothing says that it must be this large"
    metric = result["task"]["metric"]
    near = max(smaller, key=lambda group: group["dev_score"])
    scores = f"{score_said(metric, near['dev_score'])} against "
    scores += score_said(metric, ceiling["dev_score"])
    came = "the one smaller change did not come"
    if len(smaller) > 1:
        came = f"none of the {len(smaller)} smaller changes came"
    within = f"within {margin_said(result['margin'])} of it on dev"
    return f"{came} {within} (closest: {near['recipe']}, {scores})"


def _lacking(result: Mapping[str, Any]) -> list[str]:
    """Groups without a finished run of every seed, which no answer is taken from."""
    said = [
        f"{' '.join(filter(None, (group['recipe'], settings_said(group['settings']))))} "
        f"({len(group['seeds'])} of {counted(len(group['seeds'] + group['missing']), 'seed')})"
        for group in result["groups"]
        if group["missing"]
    ]
    if not said:
        return []
    found = f"Without a finished run of every seed, and so not in the choice: {'; '.join(said)}."
    if ceiling_of(result["groups"])["missing"]:
        found += " The ceiling is one of them: the answer is held against the seeds it has."
    return [found]


def caveats(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the sentence must know besides: chance, failures, lost files."""
    found = []
    ceiling, metric = ceiling_of(result["groups"]), result["task"]["metric"]
    half = (ceiling["interval"][1] - ceiling["interval"][0]) / 2
    allowed = result["margin"] * abs(ceiling["score"])
    if half > allowed:
        unit, scale = (" points", 100) if in_percent(metric) else ("", 1)
        found.append(
            f"The margin is {significant(scale * allowed)}{unit} here, and chance alone moves a "
            f"score on this test set by about ± {significant(scale * half)}{unit}: to see a "
            "difference that small takes more test examples."
        )
    if result["floor"] and result["recommended"]["key"] in result["floor"]["keys"]:
        found.append("This is the floor: nothing beyond it is needed to come within the margin.")
    if any(len(group["seeds"]) == 1 for group in result["groups"]):
        found.append(
            "Where there is a single seed, the interval holds the luck of the test examples but "
            "not that of training."
        )
    found += _lacking(result)
    failed = sum("error" in run for run in result["runs"])
    if failed:
        found.append(f"Failed, and in no number here: {counted(failed, 'run')}; see the end.")
    if result["recommended"]["file"] is None:
        found.append("The recommended file was not kept; run the study again to have it.")
    return found
