"""Several changes at once, of which each row of a batch wears one: tables with a row for each.

`Batch.rows` says which; the last row of every table is that of a row without a change. Time grows
with what the rows of a batch wear; tables hold all changes, each at the size of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine import surgery
from howfine.base import Base
from howfine.batch import worn_rows
from howfine.change import Undo, all_or_nothing
from howfine.errors import DeltaError
from howfine.slots import watched
from howfine.tokens import (
    across,
    cached,
    named,
    numbered,
    positions,
    reader,
    scaling,
    together,
    without_front,
)
from howfine.unread import Top


def stacked(parts: Mapping[int, Tensor], count: int, like: Tensor) -> Tensor:
    """(count + 1, n, …): parts by row, padded at the end with zeros; zeros where there is none."""
    longest = max((len(part) for part in parts.values()), default=0)
    table = like.new_zeros(count + 1, longest, *like.shape[1:])
    for row, part in parts.items():
        table[row, : len(part)] = part.to(table)
    return table


def fill(base: Base, tables: Mapping[int, Tensor], count: int) -> Undo:
    """Let each row's slots hold the vectors (n, E) of its own table.

    What puts vectors in front must be on before.
    """
    embedding = base.embedding
    table = stacked(tables, count, embedding.weight.detach())
    sizes = torch.zeros(count + 1, dtype=torch.long, device=table.device)
    for row, own in tables.items():
        sizes[row] = len(own)
    look_up = embedding.forward

    def forward(ids: Tensor) -> Tensor:
        found: Tensor = look_up(ids)
        here = now.here
        if here is None:
            return found
        rows = worn_rows(len(ids)).to(ids.device)
        held = sizes[rows].unsqueeze(1)
        if ((here >= held) & (held > 0)).any():
            raise DeltaError(
                "a task's inputs have more slots than its change has vectors; its file is damaged, "
                "or its template was altered"
            )
        filled = (here >= 0) & (here < held)  # of a row without vectors slots stay as they are
        chosen = table[rows.unsqueeze(1), here.clamp(0, table.shape[1] - 1)].to(found.dtype)
        return torch.where(filled.unsqueeze(-1), chosen, found)

    if not table.shape[1]:
        return lambda: None
    with all_or_nothing() as undo:
        now, off = watched(base)
        undo.append(off)
        undo.append(surgery.rewire(embedding, forward))
        return together(undo)


def prepend(base: Base, fronts: Mapping[int, Tensor], count: int) -> Undo:
    """Put each row's own vectors (n, E) before it, the last one next to the text, shorter ones
    behind positions that nothing sees."""
    table, lengths = _ended(fronts, count, base.embedding.weight.detach())
    longest = table.shape[1]
    if not longest:
        return lambda: None
    body, embedding, scale = reader(base), base.embedding, scaling(base)
    run, top = body.forward, Top(base)
    places = numbered(base)
    columns = torch.arange(longest, device=base.device) - longest

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        rows = worn_rows(len(kwargs["input_ids"])).to(base.device)
        sizes = lengths[rows].unsqueeze(1)
        if not sizes.any():
            return run(**kwargs)
        before = columns + sizes  # own number, or < 0
        if past := cached(kwargs):  # a later step of a generation: the cache has what is in front
            return run(**_later_step(base, kwargs, before, past - longest))
        own = embedding(kwargs["input_ids"])
        if places:
            kwargs["position_ids"] = _places(base, kwargs, before, sizes)
        kwargs["attention_mask"] = _seen(before, kwargs.get("attention_mask"), own.shape[1])
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = functional.pad(kwargs["token_type_ids"], (longest, 0))
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = scale * torch.cat([table[rows].to(own.dtype), own], dim=1)
        with top.unread(longest):
            state = run(**kwargs)
        return state if base.anatomy.decoder else without_front(body, state, longest)

    def longer(mask: Tensor | None, states: Tensor) -> Tensor | None:
        sizes = lengths[worn_rows(len(states)).to(base.device)].unsqueeze(1)
        length = states.shape[1] - longest
        return _seen(columns + sizes, mask, length) if sizes.any() else mask

    with all_or_nothing() as undo:
        undo.append(surgery.rewire(body, forward))
        undo.append(across(base, longer))
        return together(undo)


def _places(base: Base, kwargs: dict[str, Any], before: Tensor, sizes: Tensor) -> Tensor:
    """(B, n + S) positions of each row's own vectors, and of its text behind them."""
    front = before.clamp(min=0) + base.first_position
    return torch.cat([front, positions(base, kwargs) + sizes], dim=1)


def _later_step(base: Base, kwargs: dict[str, Any], before: Tensor, past: int) -> dict[str, Any]:
    """Inputs of a step whose cache holds what is in front of each row and `past` tokens."""
    made, length = dict(kwargs), past + kwargs["input_ids"].shape[1]
    if made.get("attention_mask") is None:
        made["attention_mask"] = before.new_ones(len(before), length)
    if numbered(base):
        made["position_ids"] = positions(base, made) + before[:, -1:] + 1
    made["attention_mask"] = _seen(before, made["attention_mask"], length)
    return made


def _ended(fronts: Mapping[int, Tensor], count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(count + 1, n, E): fronts by row, padded at their beginning; and how long each is."""
    flipped = {row: front.flip(0) for row, front in fronts.items()}
    lengths = torch.zeros(count + 1, dtype=torch.long, device=like.device)
    for row, front in fronts.items():
        lengths[row] = len(front)
    return stacked(flipped, count, like).flip(1), lengths


def _seen(before: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """(B, n + S) mask: of fronts by their own numbers, or < 0, and a text's, None for all of it."""
    if mask is None:
        mask = torch.ones(len(before), length, dtype=torch.long, device=before.device)
    return torch.cat([(before >= 0).to(mask.dtype), mask], dim=1)


def later(base: Base, counts: Mapping[int, int], count: int) -> Undo:
    """Let positions of each row's text start at its own number."""
    starts = torch.zeros(count + 1, dtype=torch.long, device=base.device)
    for row, start in counts.items():
        starts[row] = start
    body = base.body
    run = body.forward
    if not numbered(base) or not starts.any():
        return lambda: None

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = named(run, args, kwargs)
        own = positions(base, kwargs)
        kwargs["position_ids"] = own + starts[worn_rows(len(own)).to(own.device)].unsqueeze(1)
        return run(**kwargs)

    return surgery.rewire(body, forward)


def norms(base: Base, tensors: Mapping[int, Mapping[str, Tensor]], count: int) -> list[Undo] | None:
    """Let each row see its own scale and shift of the LayerNorms that the tensors are of.

    None where one of them is no LayerNorm's.
    """
    paths = sorted({path for each in tensors.values() for path in each})
    owners = sorted({path.rpartition(".")[0] for path in paths})
    modules = {owner: base.towers.get_submodule(owner) for owner in owners}
    if not all(type(module) is nn.LayerNorm for module in modules.values()):
        return None
    undo = []
    for owner, module in modules.items():
        parts = [_table(base, tensors, f"{owner}.{name}", count) for name in ("weight", "bias")]
        undo.append(surgery.rewire(module, _norm(module, *parts)))
    return undo


def _table(
    base: Base, tensors: Mapping[int, Mapping[str, Tensor]], path: str, count: int
) -> Tensor:
    """(count + 1, n): each row's own values of a parameter, or the base's."""
    original = base.original(path)
    return torch.stack(
        [tensors.get(row, {}).get(path, original).to(original) for row in range(count + 1)]
    )


def _norm(module: Any, scales: Tensor, shifts: Tensor) -> Any:
    def forward(x: Tensor) -> Tensor:
        rows = worn_rows(len(x)).to(x.device)
        plain = functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        shape = (len(x), *[1] * (x.ndim - 2), -1)
        return torch.addcmul(shifts[rows].view(shape), plain, scales[rows].view(shape))

    return forward


def bottlenecks(parts: Sequence[Mapping[str, Tensor] | None], hidden: int) -> dict[str, Tensor]:
    """Tables of what bottlenecks hold, narrower ones padded with zeros; None: nothing."""
    width = max(len(part["down.bias"]) for part in parts if part is not None)
    shapes = {
        "down.weight": (width, hidden),
        "down.bias": (width,),
        "up.weight": (hidden, width),
        "up.bias": (hidden,),
    }
    if any("norm.weight" in (part or {}) for part in parts):
        shapes |= {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    tables = {name: torch.zeros(len(parts), *shape) for name, shape in shapes.items()}
    for row, part in enumerate(parts):
        for name, value in (part or {}).items():
            tables[name][row][tuple(slice(0, size) for size in value.shape)] = value
    return tables
