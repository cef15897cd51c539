"""How the skill-grafting page says things, and from when on a difference is one."""

from __future__ import annotations

from skill_grafting_found import Curve

KEPT = 0.95  # of what fine-tuning gains over the frozen base with a head of its own
# Points of accuracy, as shares: what counts as alike, and how little a gain is too little to share.
ALIKE, LEAST_GAIN = 0.02, 0.02
Verdict = tuple[str, str]
NOT_RUN = "Not run."


def said(holds: bool) -> str:
    return "Holds." if holds else "Does not hold."


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def share(value: float, curve: Curve) -> str:
    if value == curve[0][0]:
        return f"at most {value:.2%}"
    return "all of it" if value == 1 else f"{value:.2%}"
