"""Hidden states of blocks that learn to be a teacher's: distillation of layers.

Xia, Zhong & Chen 2022 (CoFi), section 3.3: Σ over some of the teacher's layers of the mean squared
error between its states and W times those of a student's layer, where W, the identity to begin
with, trains along. Which student layer, is found at each step, as in the authors' code: from the
top down, the nearest of those that are left below the last one found.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine.base import Base
from howfine.change import Undo
from howfine.errors import SettingError

# As many of the teacher's layers are learned, evenly apart, the top one among them: of twelve
# CoFi's 2, 5, 8 and 11.
TAUGHT = 4

# (number of its block, states), for each time that a block ran.
States = list[tuple[int, Tensor]]


class Teacher:
    """A frozen copy of a base's body as it stands, with the weights `at`.

    While it listens, it notes what the base's body is given and what its blocks make of that,
    wherever gradients are taken.
    """

    def __init__(self, base: Base, at: Mapping[str, Tensor]) -> None:
        if len(base.anatomy.stacks) > 1:
            raise SettingError(
                f"{base.name} is an encoder with a decoder, whose layers' states are of different "
                "texts, so they can't be learned from a teacher's; leave `states` at 0"
            )
        self._base = base
        self._body = copy.deepcopy(base.body).requires_grad_(False).eval()
        with torch.no_grad():
            for path, value in at.items():
                if path.startswith(base.body_prefix):  # not those of a language model's head
                    self._body.get_parameter(path.removeprefix(base.body_prefix)).copy_(value)
        self._listened: list[tuple[tuple[Any, ...], dict[str, Any], States]] = []
        self._inside = False

    def listen(self) -> list[Undo]:
        """Begin to note what the base computes; the undos end it."""
        body = self._base.body
        begin = body.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = body.register_forward_hook(self._end, always_call=True)
        return [begin.remove, end.remove, *_noting(self._base, body, self._note)]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = torch.is_grad_enabled()
        if self._inside:
            self._listened.append((args, kwargs, []))

    def _end(self, *_: Any) -> None:
        self._inside = False

    def _note(self, number: int, made: Any) -> None:
        if self._inside:  # not where a checkpointed block is computed again, for its gradients
            self._listened[-1][2].append((number, _states(made)))

    def forget(self) -> None:
        """Drop what was noted, with its graphs: a step begins, and what came before is no part."""
        self._listened.clear()

    def apart(self, layer_map: Tensor, on: Sequence[bool]) -> Tensor:
        """Σ over layers of the mean squared error, a scalar; of what was noted since the last call.

        `layer_map` is W, (d, d); `on` says for each of the base's blocks whether it is there still.
        Padding does not count, where the body is told which positions that is.
        """
        listened, self._listened = self._listened, []
        found = []
        for args, kwargs, states in listened:
            taught = self._answers(args, kwargs)
            counts = _positions(kwargs.get("attention_mask"), taught[0])
            left = [own.float()[counts] for number, own in states if on[number]]
            wanted = [taught[at].float()[counts] for at in taught_layers(len(taught))]
            # Both models run in the training's number format; how far they are apart is small.
            with torch.autocast(layer_map.device.type, enabled=False):
                mine = [functional.linear(own, layer_map) for own in left]
                found.append(_distance(wanted, mine))
        return torch.stack(found).mean() if found else layer_map.new_zeros(())

    @torch.no_grad()
    def _answers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        made: list[Tensor] = []
        undo = _noting(self._base, self._body, lambda number, given: made.append(_states(given)))
        try:
            self._body(*args, **kwargs)
        finally:
            for each in undo:
                each()
        return made


def taught_layers(depth: int) -> list[int]:
    """Numbers of the layers that are learned, of so many: evenly apart, the top one last."""
    return sorted({math.ceil(depth * nth / TAUGHT) - 1 for nth in range(1, TAUGHT + 1)})


def nearest(apart: Tensor) -> list[int]:
    """For each of the teacher's layers a student's, by how far (teacher's, student's) are apart.

    From the top down, the nearest below the last one found; where none is left, that one again.
    """
    found: list[int] = []
    below = apart.shape[1]
    for row in apart.flip(0):
        if below:
            below = int(row[:below].argmin())
        found.insert(0, below)
    return found


def _distance(wanted: Sequence[Tensor], mine: Sequence[Tensor]) -> Tensor:
    """Σ of mean squared errors of each state that is wanted, to the nearest of `mine`."""
    if not mine:  # no layer is left
        return wanted[0].new_zeros(())
    with torch.no_grad():
        rows = [torch.stack([functional.mse_loss(own, state) for own in mine]) for state in wanted]
    chosen = nearest(torch.stack(rows))
    pairs = zip(chosen, wanted, strict=True)
    return torch.stack([functional.mse_loss(mine[at], state) for at, state in pairs]).sum()


def _positions(mask: Any, states: Tensor) -> Tensor:
    """(B, T) which positions count: all, unless a mask of that shape says otherwise."""
    if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
        return mask.bool()
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def _states(made: Any) -> Tensor:
    """What a block gives: states alone, or first of several things."""
    found = made[0] if isinstance(made, tuple) else made
    assert isinstance(found, Tensor)
    return found


def _noting(base: Base, body: nn.Module, note: Any) -> list[Undo]:
    """Hooks on the blocks of a body, each told by its number."""

    def hook(number: int) -> Any:
        return lambda module, given, made: note(number, made)

    blocks = (base.anatomy.block_path(number) for number in range(base.depth))
    hooks = [
        body.get_submodule(path).register_forward_hook(hook(number))
        for number, path in enumerate(blocks)
    ]
    return [each.remove for each in hooks]
