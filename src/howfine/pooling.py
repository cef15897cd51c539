"""One vector of a tower's hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(state: object, mask: Tensor | None, pooling: str) -> Tensor:
    """(B, H) from a model's output: the first, last or mean unmasked position, or the pooler's."""
    if pooling == "pooler":
        return state.pooler_output  # type: ignore[attr-defined]
    hidden: Tensor = state.last_hidden_state  # type: ignore[attr-defined]
    if pooling == "cls":
        return hidden[:, 0]
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
