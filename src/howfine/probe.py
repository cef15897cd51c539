"""A task as seen through a readout: the questions a method may ask about the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.batch import Batch, to_device
from howfine.method import Gradient, as_parameter
from howfine.readout import Wired
from howfine.task import Example

PROBE_BATCHES = 16

_SIZES: dict[Gradient, Callable[[Tensor], Tensor]] = {
    "magnitude": torch.abs,
    "square": torch.square,
    "mean": lambda gradient: gradient,
}


class GradientProbe:
    """Answers a method's questions about the data: see `howfine.method.Probe`."""

    def __init__(
        self,
        model: Wired,
        base: Base,
        examples: Sequence[Example],
        batch_size: int,
        start: Mapping[str, Tensor] | None = None,
        outside: Mapping[str, Tensor] | None = None,
        begun: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.base = model, base
        self.examples, self.batch_size = examples, batch_size
        self.start, self.outside = dict(start or {}), dict(outside or {})
        self.slots, self.begun = model.readout.slots, dict(begun or {})

    def gradients(
        self,
        base: Base,
        paths: list[str],
        of: Gradient = "magnitude",
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Of the loss, per entry, over a few batches, dropout off: see `howfine.method.Probe`."""
        with ExitStack() as undo:
            put = _put(base, at or {}, undo)
            return self._mean({path: put.get(path, base.parameter(path)) for path in paths}, of)

    def _mean(self, parameters: dict[str, nn.Parameter], of: Gradient) -> dict[str, Tensor]:
        size = _SIZES[of]
        sums = {path: torch.zeros_like(p, dtype=torch.float32) for path, p in parameters.items()}
        with self._in_use():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            try:
                for loss, batches in self._losses():
                    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                    for path, gradient in zip(parameters, found, strict=True):
                        if gradient is not None:  # a pooler that the readout never reads
                            sums[path] += size(gradient.float()) / batches
            finally:
                for parameter in parameters.values():
                    parameter.requires_grad_(False)
        return sums

    def sensitivities(
        self,
        base: Base,
        counts: Mapping[str, int],
        at: Mapping[str, Tensor] | None = None,
        *,
        positions: bool = False,
        rows: int | None = None,
    ) -> dict[str, Tensor]:
        """Of each row of a few batches by itself, dropout off: see `howfine.method.Probe`.

        ∂loss/∂ξ is the sum of input times gradient over a row's positions and a factor's inputs,
        and of all runs of a module that several layers share.
        """
        found: dict[str, list[Tensor]] = {path: [] for path in counts}
        with ExitStack() as undo:
            undo.enter_context(self._in_use())
            _put(base, at or {}, undo)
            met: list[tuple[str, Tensor]] = []
            for path in counts:
                host = base.towers.get_submodule(path.rpartition(".")[0])
                undo.callback(host.register_forward_pre_hook(_noting(met, path)).remove)
            read = self.model.readout
            # A mean over a batch's tokens has no rows in it; pairs need those of their batch.
            batches = self._chosen(not read.adds_up and not read.aligns, rows, not read.aligns)
            for chosen in batches:
                loss = self.model(**self._batch(chosen).as_kwargs())["loss"]
                own = _of_rows(loss, met, counts, positions)
                size = max(map(len, own.values()), default=1)
                for path, count in counts.items():  # the loss is a mean over rows
                    none = torch.zeros(size, count, device=base.device)
                    found[path].append(own.get(path, none) * size)
                met.clear()
        joined = {path: torch.cat(each) for path, each in found.items()}
        if read.aligns:  # as they came; of a tower of pictures a row is a picture
            return joined
        places = self._places(rows)
        back = torch.argsort(torch.tensor([places[row] for chosen in batches for row in chosen]))
        return {path: own[back.to(base.device)] for path, own in joined.items()}

    def runs(
        self, base: Base, at: Mapping[str, Tensor] | None = None, *, rows: int | None = None
    ) -> Iterator[Batch]:
        """Of the rows of `sensitivities`, in batches: see `howfine.method.Probe`."""
        with ExitStack() as undo:
            undo.enter_context(self._in_use())
            _put(base, at or {}, undo)
            for chosen in self._chosen(count=rows, sort=not self.model.readout.aligns):
                batch = self._batch(chosen)
                with torch.no_grad():
                    self.model(**batch.as_kwargs())
                yield batch

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The model in evaluation mode; the mode it had comes back when nothing of it trains."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _losses(self) -> Iterator[tuple[Tensor, int]]:
        """Losses of a few batches, always the same ones, and how many there are."""
        batches = self._chosen()
        for chosen in batches:
            yield self.model(**self._batch(chosen).as_kwargs())["loss"], len(batches)

    def _batch(self, chosen: Sequence[int]) -> Batch:
        """These examples on the base's device."""
        batch = self.model.readout.collate(self.base, [self.examples[row] for row in chosen])
        return Batch.from_kwargs(to_device(batch.as_kwargs(), self.base.device))

    def _places(self, count: int | None = None) -> dict[int, int]:
        """Numbers of a few examples, always the same ones, and of each its place among them."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        order = order[: count or PROBE_BATCHES * self.batch_size]
        return {row: place for place, row in enumerate(order)}

    def _chosen(
        self, alone: bool = False, count: int | None = None, sort: bool = False
    ) -> list[list[int]]:
        """Numbers of the examples of each batch; a batch each, where `alone`.

        With `sort` from the shortest text to the longest: less is computed for padding.
        """
        order = list(self._places(count))
        if sort:
            order.sort(key=lambda row: sum(map(len, self.examples[row].texts)))
        size = 1 if alone else self.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]


def _of_rows(
    loss: Tensor, met: list[tuple[str, Tensor]], counts: Mapping[str, int], positions: bool
) -> dict[str, Tensor]:
    """(rows, n) derivatives of a loss by path, of the inputs that were met."""
    found: dict[str, Tensor] = {}
    gradients = torch.autograd.grad(loss, [state for _, state in met], allow_unused=True)
    for (path, state), gradient in zip(met, gradients, strict=True):
        if gradient is None:
            continue
        product = (state.detach() * gradient).float().unflatten(-1, (counts[path], -1)).sum(-1)
        product = product.abs() if positions else product
        own = product.flatten(1, -2).sum(1) if product.ndim > 2 else product
        found[path] = found[path] + own if path in found else own
    return found


def _put(base: Base, at: Mapping[str, Tensor], undo: ExitStack) -> dict[str, nn.Parameter]:
    """Let the base's weights be those of `at` until the stack is left."""
    values = {path: as_parameter(weight, base.parameter(path)) for path, weight in at.items()}
    for path, value in values.items():
        undo.callback(surgery.replace(base.towers, path, value))
    return values


def _noting(met: list[tuple[str, Tensor]], path: str) -> Callable[..., Any]:
    """A hook that notes what a module is given, as something that has a gradient."""

    def note(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states = given[0]
        if not states.requires_grad:  # of the lowest such module: nothing beneath it trains
            states = states.detach().requires_grad_(True)
        met.append((path, states))
        return (states, *given[1:])

    return note
