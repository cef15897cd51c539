"""Method: what may change in a base. The contract, and the registry, which is the folder.

A method is one file in `howfine/methods/`: a docstring that names the paper and its equation, one
frozen dataclass whose fields are its settings, and an `EXAMPLE` of it. The command line, the laws,
the docs check, the study and the cost table find it by being there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from howfine import plugins
from howfine.base import Base, TwoTowers
from howfine.batch import Batch
from howfine.change import Change
from howfine.errors import SettingError

Tensors = dict[str, Tensor]


Gradient = Literal["magnitude", "square", "mean"]


class Probe(Protocol):
    """A task as seen through a readout: what a method may ask about the data."""

    @property
    def start(self) -> Mapping[str, Tensor]:
        """Weights to start from, by path, where they differ from the base's.

        Those of the phase before, or of another checkpoint.
        """
        ...

    @property
    def outside(self) -> Mapping[str, Tensor]:
        """Entries to leave as they are, as boolean masks by path: the regions of other deltas."""
        ...

    @property
    def begun(self) -> Mapping[str, Tensor]:
        """What an earlier delta of the same method holds, to go on from: see `Method.start`."""
        ...

    @property
    def slots(self) -> tuple[str, ...]:
        """Free positions that the readout has in every input: a word to begin with, or ""."""
        ...

    def gradients(
        self,
        base: Base,
        paths: list[str],
        of: Gradient = "magnitude",
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Mean |∂loss/∂θ|, (∂loss/∂θ)² or ∂loss/∂θ per entry over a few batches.

        Taken at the base, or where its weights are those of `at`.
        """
        ...

    def sensitivities(
        self,
        base: Base,
        counts: Mapping[str, int],
        at: Mapping[str, Tensor] | None = None,
        *,
        positions: bool = False,
        rows: int | None = None,
    ) -> dict[str, Tensor]:
        """(rows, n) ∂loss/∂ξ of each example by itself, by path, of n factors ξ = 1.

        They are on a matrix's inputs, each on as many neighbouring ones. With `positions` the sum
        over positions is one of magnitudes. Taken where `gradients` are, of so many `rows`.
        """
        ...

    def runs(
        self, base: Base, at: Mapping[str, Tensor] | None = None, *, rows: int | None = None
    ) -> Iterator[Batch]:
        """Run the model batch by batch, without gradients and dropout: hooks listen meanwhile.

        Gives each batch of train rows once it has run, always the same ones: the rows, and the
        weights, that `sensitivities` takes.
        """
        ...


class Method(ABC):
    """Puts a trainable Change on a Base, packs it into few tensors, and puts it back exactly.

    Subclasses are final, frozen dataclasses with at most six fields.
    """

    # Whether attaching alone leaves the outputs as they were.
    starts_at_base: ClassVar[bool] = True
    # Whether a fit starts from the weights of an earlier phase or another checkpoint (Probe.start),
    # or from what a delta of its own method holds ("own", Probe.begun); every method may go on from
    # an earlier phase's head.
    start: ClassVar[Literal["none", "optional", "needed", "own"]] = "none"
    # Of its settings, those that say what such a delta's tensors mean: they must be the same.
    meaning: ClassVar[tuple[str, ...]] = ()
    # What it packs and unpacks, whatever its settings: the new values of some entries of any
    # tensors of the base (sparse tensors at their paths), of any whole tensors, or something else.
    holds: ClassVar[Literal["entries", "tensors", "other"]] = "other"
    # Whether files of that kind that no training made, as by extraction or composition, name it:
    # it reads them at its defaults. One method for each kind.
    neutral: ClassVar[bool] = False
    # Whether it leaves entries alone that a recipe names as `outside` (Probe.outside).
    keeps_out: ClassVar[bool] = False
    # Whether a file of it can be put on smaller than it was stored, by its setting `keep`.
    resizable: ClassVar[bool] = False
    # Whether it is made of a method for each tower of a base of two, `of_each` of one for both.
    for_towers: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if cls.__bases__ != (Method,):
            raise TypeError(f"{cls.__name__}: methods are final; wrap one instead of subclassing")

    @abstractmethod
    def attach(self, base: Base, probe: Probe | None = None) -> Change:
        """Put trainables on; the base stays frozen."""

    @abstractmethod
    def pack(self, base: Base, change: Change) -> Tensors:
        """The fewest tensors that say it all.

        A bool tensor is a set of places; a sparse tensor at a path of the base holds the new values
        of some of its entries. Whatever is no change (equal to the base's) may be left out.
        """

    @abstractmethod
    def unpack(self, base: Base, tensors: Tensors) -> Change:
        """Put a packed change on again, exactly."""

    @classmethod
    def wear(
        cls, base: Base, worn: Mapping[int, tuple[Self, Tensors]], count: int
    ) -> Change | None:
        """Put several packed changes of this method on, for batches whose rows wear one each.

        `worn` has them by their number in `Batch.rows`, which goes from 0 to `count`; a row of
        another number is as without them. None where this can't be: each then has a pass of its
        own.
        """
        return None

    @classmethod
    def of_each(cls, method: Method) -> Method:
        """A method of two towers (`for_towers`) that puts one and the same on both."""
        raise NotImplementedError

    def takes(self, base: Base, tensors: Tensors) -> int:
        """Positions that a packed change takes away from texts (`Base.reserved`)."""
        return 0

    def passes(self, change: Change, progress: float) -> Iterator[float]:
        """Set the change up for each forward pass of a step at `progress` (0 to 1) of training.

        Yields, for each, the share of its loss that is how far its outputs are from those of the
        first (`Readout.imitation`); the rest is the loss itself. A step takes the mean over passes.
        """
        yield 0.0

    @property
    def moves(self) -> Literal["", "steps", "passes"]:
        """Between what frozen weights are read differently in training: steps, a step's passes.

        What one step computes of them is then not to be kept for another, or computed again later.
        """
        return ""

    def finished(self, change: Change) -> bool:
        """Whether what would be stored now is what was asked for: only then may it be the best.

        As small as asked, and not empty.
        """
        return True

    def penalty(self, change: Change, progress: float) -> Tensor:
        """What the paper adds to the loss at `progress` (0 to 1) of training; 0 without one."""
        return torch.zeros(())

    def groups(self, change: Change) -> list[dict[str, Any]]:
        """Optimiser groups: `params` and, where they want their own, the settings of a rate.

        `lr` or `lr_scale` (times the training's), `weight_decay`, `constant` (a rate that no
        schedule touches), `clip` (a name: groups of one name are clipped by their own joint norm).
        """
        return [{"params": list(change.trainable.values())}]

    def stored(self, change: Change, store: str) -> Tensors:
        """What trains, by its name in the change, as a file of precision `store` gives it back.

        For the last steps of a training, which are taken with those values. Nothing where what
        trains is not what is stored.
        """
        return {}

    def learning_rate(self, steps: int) -> float:
        """The peak rate where a recipe names none, for AdamW and `steps` steps of linear decay."""
        return 5e-5

    def rate_for(self, change: Change, steps: int) -> float:
        """The same for a change just attached: where the rate depends on what was found then."""
        return self.learning_rate(steps)


def as_parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A frozen parameter holding `tensor` in the format and on the device of `like`."""
    return nn.Parameter(tensor.to(device=like.device, dtype=like.dtype), requires_grad=False)


def methods() -> dict[str, type[Method]]:
    """Every method by name: the modules of `howfine.methods`, and of plugin folders."""
    return plugins.registry("methods", Method)


def method(name: str, **settings: Any) -> Method:
    """A method by name. Raises SettingError with the near name for what is unknown."""
    return plugins.build("method", methods(), name, settings)


def fitting(found: Method, base: Base) -> Method:
    """A method for a base: for two towers one that is made of others, else the method itself.

    Raises SettingError for a method of two towers and a base of one.
    """
    composed = [each for each in methods().values() if each.for_towers]
    if isinstance(base, TwoTowers):
        return found if found.for_towers else composed[0].of_each(found)
    if found.for_towers:
        raise SettingError(
            f"{type(found).__name__} has a method for each of two towers, and {base.name} has one; "
            "give an image and a text encoder, with a plus in between their names"
        )
    return found


def holding(what: Literal["tensors", "entries"]) -> Method:
    """The neutral method at its defaults, for a file of whole tensors, or entries, of any origin.

    Raises SettingError unless exactly one method says that it is that.
    """
    found = [name for name, cls in methods().items() if cls.holds == what and cls.neutral]
    if len(found) != 1:
        raise SettingError(
            f"neutral methods that hold {what}: found {' and '.join(found) or 'none'}, expected "
            "exactly one; let one of them set `neutral = True`, and remove it from the others"
        )
    return methods()[found[0]]()


def examples() -> dict[str, Method]:
    """Every method's own EXAMPLE, by name: what laws, docs and benches run."""
    return plugins.examples("methods", Method)
