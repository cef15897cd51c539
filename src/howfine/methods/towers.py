"""A method for each tower of a base of two: an image and a text encoder, aligned.

Khan & Fu 2023 (LilT), section 3: either tower may be locked, or change by a method of its own, such
as adapters beside LayerNorm. Any other method put on such a base is put on both towers, each by
itself: a budget it has is each tower's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from howfine import plugins
from howfine.base import IMAGE, TEXT, Base, TwoTowers
from howfine.batch import Batch
from howfine.change import Change, all_or_nothing
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Gradient, Method, Probe, Tensors, methods

# Two methods' rates stay in the proportion that their own ones have for so many steps.
_STEPS = 1000
# A method by name and its settings; {} for a locked tower.
Named = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Towers(Method):
    """What changes in the image tower, and what in the text tower."""

    starts_at_base: ClassVar[bool] = False
    for_towers: ClassVar[bool] = True
    meaning: ClassVar[tuple[str, ...]] = ("image", "text")

    # A method of the image tower, {name: settings}; {} to lock the tower.
    image: Named = field(default_factory=dict)
    # A method of the text tower, alike.
    text: Named = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tower, named in ((IMAGE, self.image), (TEXT, self.text)):
            if len(named) > 1:
                raise SettingError(
                    f"{tower} tower: found the methods {' and '.join(named)}, expected one, or none"
                )
            for name, settings in named.items():
                built = plugins.build(f"{tower} tower's method", methods(), name, settings or {})
                if built.for_towers:
                    raise SettingError(f"{tower} tower: {name!r} is for two towers; give another")

    @classmethod
    def of_each(cls, method: Method) -> Method:
        name = plugins.name_of("methods", Method, method)
        named = {name: plugins.settings_of(method)}
        return cls(image=named, text=named)

    def parts(self) -> dict[str, Method]:
        """The methods by tower; a locked tower has none."""
        return {
            tower: plugins.build("method", methods(), name, settings or {})
            for tower, named in ((IMAGE, self.image), (TEXT, self.text))
            for name, settings in named.items()
        }

    @property
    def start(self) -> Any:  # type: ignore[override]
        """The most that any of its methods asks for."""
        asked = {part.start for part in self.parts().values()}
        return next((each for each in ("needed", "optional", "own") if each in asked), "none")

    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        found: dict[str, Change] = {}
        with all_or_nothing() as undo:
            for tower, method in self.parts().items():
                seen = None if probe is None else _OneTower(probe, base, tower)
                found[tower] = method.attach(_part(base, tower), seen)
                undo.append(found[tower].remove)
            return _joined(found)

    def pack(self, base: Base, change: Change) -> Tensors:
        return {
            _outer(base, tower, name): value
            for tower, method in self.parts().items()
            for name, value in method.pack(_part(base, tower), change.parts[tower]).items()
        }

    def unpack(self, base: Base, tensors: Tensors) -> Change:
        apart = _apart(tensors)
        parts = self.parts()
        if odd := apart.keys() - parts.keys():
            raise DamagedDelta(
                f"the delta holds tensors of {' and '.join(sorted(odd))}, and its method changes "
                f"{' and '.join(parts) or 'neither tower'}; the file is damaged"
            )
        found: dict[str, Change] = {}
        with all_or_nothing() as undo:
            for tower, method in parts.items():
                found[tower] = method.unpack(_part(base, tower), apart.get(tower, {}))
                undo.append(found[tower].remove)
            return _joined(found)

    def passes(self, change: Change, progress: float) -> Iterator[float]:
        each = [m.passes(change.parts[t], progress) for t, m in self.parts().items()]
        for shares in itertools.zip_longest(*each, fillvalue=0.0) if each else [(0.0,)]:
            yield max(shares)

    @property
    def moves(self) -> Any:
        asked = {part.moves for part in self.parts().values()}
        return next((each for each in ("passes", "steps") if each in asked), "")

    def finished(self, change: Change) -> bool:
        return all(method.finished(change.parts[tower]) for tower, method in self.parts().items())

    def penalty(self, change: Change, progress: float) -> Tensor:
        each = [m.penalty(change.parts[t], progress) for t, m in self.parts().items()]
        return torch.stack([part.cpu() for part in each]).sum() if each else torch.zeros(())

    def groups(self, change: Change) -> list[dict[str, Any]]:
        parts, made = self.parts(), []
        rates = {t: method.rate_for(change.parts[t], _STEPS) for t, method in parts.items()}
        for tower, method in parts.items():
            for group in method.groups(change.parts[tower]):
                scale = group.get("lr_scale", 1.0) * rates[tower] / max(rates.values())
                clip = f"{tower} {group['clip']}" if group.get("clip") else ""
                made.append({**group, "lr_scale": scale, "clip": clip})
        return made

    def stored(self, change: Change, store: str) -> Tensors:
        return {
            _of(tower, name): value
            for tower, method in self.parts().items()
            for name, value in method.stored(change.parts[tower], store).items()
        }

    def learning_rate(self, steps: int) -> float:
        rates = [method.learning_rate(steps) for method in self.parts().values()]
        return max(rates, default=super().learning_rate(steps))

    def rate_for(self, change: Change, steps: int) -> float:
        parts = self.parts().items()
        rates = [method.rate_for(change.parts[tower], steps) for tower, method in parts]
        return max(rates, default=super().learning_rate(steps))


def _part(base: Base, tower: str) -> Base:
    if not isinstance(base, TwoTowers):
        raise SettingError(
            f"a method for each of two towers meets the base {base.name}, which has one; give an "
            "image and a text encoder, with a plus in between their names"
        )
    return base.parts[tower]


def _joined(found: Mapping[str, Change]) -> Change:
    """One change of each tower's, which its parts hold by tower."""
    trainable = {
        _of(tower, name): value
        for tower, each in found.items()
        for name, value in each.trainable.items()
    }
    return Change(trainable, [each.remove for each in found.values()], parts=dict(found))


def _of(tower: str, name: str) -> str:
    """A parameter's name in the change: a path is one already, any other gets its tower's."""
    return name if name.startswith(f"{tower}.") else f"{tower}:{name}"


def _outer(base: Base, tower: str, name: str) -> str:
    """A tensor's name in the file: a path of the base as it is, any other with its tower's."""
    return name if name in set(_part(base, tower).paths()) else f"{tower}:{name}"


def _apart(tensors: Tensors) -> dict[str, Tensors]:
    """Tensors by tower, under the names that its method gave them."""
    apart: dict[str, Tensors] = {}
    for name, value in tensors.items():
        tower, colon, own = name.partition(":")
        if not colon:
            tower, own = name.partition(".")[0], name
        apart.setdefault(tower, {})[own] = value
    return apart


class _OneTower:
    """A probe that shows one tower's share of what came before."""

    def __init__(self, probe: Probe, base: Base, tower: str) -> None:
        self.probe, self.base, self.slots = probe, base, probe.slots
        own = f"{tower}."
        self.start = {path: value for path, value in probe.start.items() if path.startswith(own)}
        self.outside = {p: value for p, value in probe.outside.items() if p.startswith(own)}
        self.begun = _apart(dict(probe.begun)).get(tower, {})

    def gradients(
        self,
        base: Base,
        paths: list[str],
        of: Gradient = "magnitude",
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Of the loss of both towers."""
        return self.probe.gradients(self.base, paths, of, at)

    def sensitivities(
        self,
        base: Base,
        counts: Mapping[str, int],
        at: Mapping[str, Tensor] | None = None,
        *,
        positions: bool = False,
        rows: int | None = None,
    ) -> dict[str, Tensor]:
        """Of the loss of both towers."""
        return self.probe.sensitivities(self.base, counts, at, positions=positions, rows=rows)

    def runs(
        self, base: Base, at: Mapping[str, Tensor] | None = None, *, rows: int | None = None
    ) -> Iterator[Batch]:
        """Of both towers."""
        return self.probe.runs(self.base, at, rows=rows)


EXAMPLE = Towers()
