"""M masks, M vectors for each class, and prototypes: few-shot answers without words for classes.

Karimi Mahabadi et al. 2022, "PERFECT: Prompt-free and efficient few-shot learning with language
models", equations 3 to 5, and the authors' code where the two differ: hidden states h_i at M mask
positions are scored by label vectors, t_i = L_i·h_i, under a multi-class hinge loss with margin 1.
Answers come from prototypes instead, the mean h_i of each class's training examples: the class with
the smallest squared distance between unit vectors at any of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine import language, template
from howfine.base import Base
from howfine.batch import Batch, running, to_device
from howfine.errors import SettingError
from howfine.readout import Head, Labels, Readout, Wired
from howfine.task import Example

# A squared distance that no two unit vectors have more of.
FARTHEST = 4.0


@dataclass(frozen=True)
class LabelEmbedding(Readout):
    """Where the masks stand, how label vectors begin, and what answers."""

    # Layout of an input: see `howfine.template`.
    template: str = "{text} {mask} {pair}"
    # Tokens kept of an input; texts are cut, never masks.
    max_length: int = 128
    # A word (or several) for each class in the labels' order: label vectors begin as their first
    # pieces. None: all at random.
    words: tuple[str, ...] = ()
    # Deviation of what is drawn at random.
    std: float = 1e-4
    # What answers: nearest prototype of unit length, nearest one as it is (the paper's equation),
    # or the highest score of the label vectors.
    inference: Literal["prototypes", "raw_prototypes", "scores"] = "prototypes"
    # The loss: multi-class hinge, or cross-entropy.
    objective: Literal["hinge", "cross_entropy"] = "hinge"

    def __post_init__(self) -> None:
        if not template.parse(self.template).masks:
            raise SettingError(f"label_embedding template {self.template!r} has no {{mask}}")
        if self.max_length < 1 or not 0 <= self.std < 10:
            raise SettingError(
                f"label_embedding: found max_length {self.max_length} and std {self.std}, expected "
                "at least 1 and a deviation from 0"
            )

    @property
    def slots(self) -> tuple[str, ...]:
        return template.parse(self.template).slots

    @property
    def goes_on(self) -> bool:
        return not self.remembers  # label vectors are not stored beside prototypes

    @property
    def remembers(self) -> bool:
        return self.inference != "scores"

    def attach(self, base: Base, labels: Labels) -> Head:
        if not labels:
            raise SettingError(
                "label_embedding needs classes, and this task is a regression; use classifier"
            )
        if base.tokenizer is None or base.tokenizer.mask_token_id is None:
            raise SettingError(
                f"label_embedding reads masks, and {base.name} has no mask token; give a masked "
                "language model"
            )
        if self.words and len(self.words) != len(labels):
            raise SettingError(
                f"label_embedding words: found {len(self.words)}, expected {len(labels)}: one for "
                f"each of {list(labels)}"
            )
        return _LabelVectors(base, self, len(labels))

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        batch = template.parse(self.template).fill(base, examples, self.max_length)
        if labelled:
            batch.targets = torch.tensor([example.label for example in examples])
        return batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs[:, 0].float()  # (B, M, K)
        each, gold = scores.flatten(0, 1), targets.repeat_interleave(scores.shape[1])
        if self.objective == "hinge":
            return functional.multi_margin_loss(each, gold)
        return functional.cross_entropy(each, gold)

    def predict(self, outputs: Tensor) -> Tensor:
        return _answers(outputs).argmax(-1)

    def learned(self, outputs: Tensor) -> Tensor:
        # At the label vectors, which train: prototypes are those of the last evaluation.
        return outputs[:, 0]

    def probabilities(self, outputs: Tensor) -> Tensor:
        return _answers(outputs).double().softmax(-1)

    def remember(self, model: Wired, base: Base, examples: Sequence[Example]) -> None:
        head: Any = model.head
        if self.remembers:
            head.prototypes.copy_(_means(head, model, base, self, examples))

    def pack(self, head: Head) -> dict[str, Tensor]:
        """What answers read: the prototypes, or the label vectors. The other is not stored."""
        state = head.state_dict()
        name = "prototypes" if self.remembers else "vectors"
        return {name: state[name].detach().clone()}

    def unpack(self, base: Base, labels: Labels, tensors: dict[str, Tensor]) -> Head:
        self.check_fits(base, labels, tensors)
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten, or never read
            head = self.attach(base, labels)
        with torch.no_grad():
            for value in head.state_dict().values():  # what is not stored is nothing, each time
                value.zero_()
        head.load_state_dict(tensors, strict=False)
        return head.to(base.device)


def _answers(outputs: Tensor) -> Tensor:
    """(B, K): what each class is answered by, at the mask where it is highest."""
    return outputs[:, 1].amax(1)


class _LabelVectors(Head):
    """L (K, M, H), and as many numbers of prototypes. Outputs are (B, 2, M, K): scores, answers."""

    prototypes: Tensor

    def __init__(self, base: Base, settings: LabelEmbedding, classes: int) -> None:
        super().__init__()
        self.body_path = base.body_path
        self.inference = settings.inference
        shape = (classes, template.parse(settings.template).masks, base.hidden_size)
        self.vectors = nn.Parameter(settings.std * torch.randn(shape))
        if settings.words:
            self._begin_as(base, settings.words)
        self.register_buffer("prototypes", torch.zeros(shape))

    def _begin_as(self, base: Base, words: tuple[str, ...]) -> None:
        """The embedding rows of the words' first pieces, one for each mask as far as they go."""
        table = base.original(f"{base.embedding_path}.weight").float().cpu()
        if table.shape[1] != base.hidden_size:
            raise SettingError(
                f"label_embedding words are vectors of {table.shape[1]} numbers and hidden states "
                f"of {base.name} have {base.hidden_size}; leave them out"
            )
        with torch.no_grad():
            for vectors, word in zip(self.vectors, words, strict=True):
                ids = language.pieces(base, word)[: len(vectors)]
                vectors[: len(ids)] = table[ids]

    def states(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        """(B, M, H): the last hidden states at the masks."""
        state = towers.get_submodule(self.body_path)(**batch.inputs).last_hidden_state
        assert batch.reads is not None
        rows = torch.arange(state.shape[0], device=state.device).unsqueeze(1)
        return state[rows, batch.reads].to(self.vectors.dtype)

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        states = self.states(towers, batch)
        scores = torch.einsum("bmh,kmh->bmk", states, self.vectors)
        nearest = scores.detach()
        if self.inference != "scores" and not self.training:
            nearest = -_distances(states, self.prototypes, self.inference == "prototypes")
        return torch.stack([scores, nearest], dim=1)


def _distances(states: Tensor, prototypes: Tensor, unit: bool) -> Tensor:
    """(B, M, K) squared distances of (B, M, H) and (K, M, H); far where there is no prototype."""
    none = (prototypes == 0).all(-1).t()  # (M, K)
    if unit:
        states = functional.normalize(states, dim=-1)
        prototypes = functional.normalize(prototypes, dim=-1)
    apart = (states.unsqueeze(2) - prototypes.transpose(0, 1)).square().sum(-1)
    return torch.where(none, apart.new_tensor(FARTHEST) if unit else apart + apart.amax(), apart)


@torch.no_grad()
def _means(
    head: _LabelVectors,
    model: Wired,
    base: Base,
    readout: LabelEmbedding,
    examples: Sequence[Example],
) -> Tensor:
    """(K, M, H): the mean state of each class's examples, in evaluation mode."""
    sums = torch.zeros_like(head.prototypes)
    counts = torch.zeros(len(sums), device=sums.device)
    was_training = model.training
    model.eval()
    for start in range(0, len(examples), 64):
        rows = examples[start : start + 64]
        batch = Batch.from_kwargs(to_device(readout.collate(base, rows).as_kwargs(), base.device))
        with running(batch):
            states = head.states(model.towers, batch)
        assert batch.targets is not None
        sums.index_add_(0, batch.targets, states)
        counts += torch.bincount(batch.targets, minlength=len(counts))
    model.train(was_training)
    return sums / counts.clamp(min=1).view(-1, 1, 1)


EXAMPLE = LabelEmbedding(template="{text} {mask*2} {pair}", max_length=32)
