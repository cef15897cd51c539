"""A readout's own vectors beside a frozen vocabulary: markers, segment types and an end.

One small table serves three uses, as new rows of a tied table would (Lin, Madotto & Fung 2020,
"Exploring versatile generative language model", §3): a vector stands at a position in place of a
word's (`Batch.marks`), is added to a position's (`Batch.types`), and the second one is read as the
output vector of one more token, the end. The vocabulary's own rows are never touched, so no
optimiser and no weight decay can move them, and no other task's rows are ever among the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from howfine import language, surgery
from howfine.base import Base
from howfine.batch import Batch, current, worn_rows
from howfine.change import Undo, all_or_nothing
from howfine.tokens import cached, named, reader, together

# Rows of every table: what begins an input, what ends a text; the kinds of segments follow.
BEGINNING, END, KINDS = 0, 1, 2


def ending(base: Base) -> int:
    """The number of the token that a table's second vector is: the first that no word has."""
    return len(language.decoder(base).weight)


def put_on(base: Base, table: Tensor) -> Undo:
    """Let the running batch's marks and types be rows of `table` (n, E), and its second an end."""

    def rows(numbers: Tensor) -> Tensor:
        return table[numbers]

    def scores(states: Tensor) -> Tensor:
        return states @ table[END].to(states.dtype).unsqueeze(-1)

    return _put_on(base, rows, scores)


def wear(base: Base, tables: Mapping[int, Tensor], count: int) -> Undo:
    """Let each row's be of its own table: those of changes by number, from 0 to `count`.

    A row of another number has no marks and no types, and never ends by a vector.
    """
    longest = max(map(len, tables.values()))
    like = next(iter(tables.values()))
    stacked = like.new_zeros(count + 1, longest, like.shape[1])
    bias = like.new_full((count + 1, 1), -torch.inf)
    for row, table in tables.items():
        stacked[row, : len(table)], bias[row] = table, 0

    def rows(numbers: Tensor) -> Tensor:
        own = worn_rows(len(numbers)).to(numbers.device)
        return stacked[own.unsqueeze(1), numbers]

    def scores(states: Tensor) -> Tensor:
        own = worn_rows(len(states)).to(states.device)
        found = torch.einsum("bsh,bh->bs", states, stacked[own, END].to(states.dtype))
        return (found + bias[own].to(states.dtype)).unsqueeze(-1)

    return _put_on(base, rows, scores)


def _put_on(
    base: Base, rows: Callable[[Tensor], Tensor], scores: Callable[[Tensor], Tensor]
) -> Undo:
    embedding, out = base.embedding, language.decoder(base)
    look_up, compute = embedding.forward, out.forward
    scale = float(getattr(embedding, "embed_scale", 1.0))
    last = ending(base) - 1

    def embed(ids: Tensor) -> Tensor:
        # Behind its own end a row reads that once more, while others go on.
        found: Tensor = look_up(ids.masked_fill(ids == last + 1, last))
        batch = current()
        if reading.later is None or batch is None or batch.types is None:
            return found
        marks, types = _numbers(batch, ids, reading.later)
        for numbers, put in ((marks, torch.where), (types, _added)):
            if numbers is not None:
                chosen = scale * rows(numbers.clamp(min=0)).to(found.dtype)
                found = put((numbers >= 0).unsqueeze(-1), chosen, found)
        return found

    def decode(states: Tensor) -> Tensor:
        found: Tensor = compute(states)
        return torch.cat([found, scores(states).to(found.dtype)], dim=-1)

    with all_or_nothing() as undo:
        reading = _Reading()
        undo.append(surgery.rewire(reader(base), reading.of(reader(base).forward)))
        undo.append(surgery.rewire(embedding, embed))
        undo.append(surgery.rewire(out, decode))
        return together(undo)


def _added(here: Tensor, chosen: Tensor, found: Tensor) -> Tensor:
    return found + chosen * here


def _numbers(batch: Batch, ids: Tensor, later: bool) -> tuple[Tensor | None, Tensor | None]:
    """(marks, types) of what is read now; of a later step, types go on as the sources ended.

    Beams read each row several times, one after the other.
    """
    assert batch.types is not None
    types, marks = batch.types, batch.marks
    if later:
        types, marks = types[:, -1:].expand(-1, ids.shape[1]), None
    beams, rest = divmod(len(ids), len(types))
    if rest or ids.shape[1] != types.shape[1]:
        raise RuntimeError(
            f"the model reads inputs of shape {tuple(ids.shape)} and the batch says what its "
            f"segments are in inputs of shape {tuple(types.shape)}"
        )
    types = types.to(ids.device).repeat_interleave(beams, dim=0)
    return None if marks is None else marks.to(ids.device).repeat_interleave(beams, dim=0), types


class _Reading:
    """Whether the reader reads a batch's inputs (False), a later token (True), or nothing (None).

    To see inputs that another change makes longer as they were, it is put on after that one.
    """

    later: bool | None = None

    def of(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The reader's forward, watched."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = named(run, args, kwargs)
            self.later = cached(kwargs) > 0
            try:
                return run(**kwargs)
            finally:
                self.later = None

        return forward
