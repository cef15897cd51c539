"""Free vectors in place of words, at the slots of the running batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from howfine import surgery
from howfine.base import Base
from howfine.batch import current
from howfine.change import Undo, all_or_nothing
from howfine.errors import DeltaError
from howfine.tokens import cached, named, reader, together

_HELD = "howfine_vectors"


@dataclass
class Slots:
    """Where free vectors stand in what the reader reads now."""

    here: Tensor | None = None  # (B, S), -1 for a word; None while nothing or a later token is read


def watched(base: Base) -> tuple[Slots, Undo]:
    """The slots of the running batch, while the reader reads its inputs and at no other time.

    Beams read each row several times, one after the other. To see inputs that another change makes
    longer as they were, watch after it was put on. Raises RuntimeError, in a forward pass, for
    inputs that are not the batch's.
    """
    found, body = Slots(), reader(base)
    run = body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        found.here = _slots_of(kwargs)
        try:
            return run(**kwargs)
        finally:
            found.here = None

    return found, surgery.rewire(body, forward)


def _slots_of(kwargs: dict[str, Any]) -> Tensor | None:
    batch, ids = current(), kwargs.get("input_ids")
    if batch is None or batch.slots is None or ids is None or cached(kwargs):
        return None
    beams, rest = divmod(len(ids), len(batch.slots))
    if rest or ids.shape[1] != batch.slots.shape[1]:
        raise RuntimeError(
            f"the model reads inputs of shape {tuple(ids.shape)} and the batch says where slots "
            f"are in inputs of shape {tuple(batch.slots.shape)}"
        )
    return batch.slots.to(ids.device).repeat_interleave(beams, dim=0)


def fill(base: Base, vectors: nn.Parameter, slots: int) -> Undo:
    """Let the first `slots` rows of `vectors` (n, E) stand at the slots of the running batch.

    The embedding module holds the parameter. What puts vectors in front must be on before.
    """
    embedding = base.embedding
    look_up = embedding.forward
    checked: list[bool] = []

    def forward(ids: Tensor) -> Tensor:
        found, here = look_up(ids), now.here
        if here is None:
            return found
        if not checked:  # once: it asks an accelerator for a number
            checked.append(True)
            if int(here.max()) >= slots:
                raise DeltaError(
                    f"the readout's inputs have {int(here.max()) + 1} slots and the change holds "
                    f"{slots} vectors for them; the file is damaged, or its template was altered"
                )
        chosen = vectors[here.clamp(min=0)].to(found.dtype)
        return torch.where((here >= 0).unsqueeze(-1), chosen, found)

    with all_or_nothing() as undo:
        undo.append(surgery.hold(embedding, _HELD, vectors))
        now, off = watched(base)
        undo.append(off)
        undo.append(surgery.rewire(embedding, forward))
        return together(undo)
