"""Readout: how the output becomes an answer, and what is the loss. The contract.

A readout is one file in `howfine/readouts/`, like a method: a docstring, a frozen dataclass, an
`EXAMPLE`. Its own small parameters are its head, an nn.Module; an *attention* head is something
else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine import plugins
from howfine.base import Base
from howfine.batch import Batch, running
from howfine.checks import ALIGNMENT, CLASSIFICATION, GENERATION
from howfine.errors import DamagedDelta, SettingError
from howfine.method import Tensors
from howfine.metrics import Metric
from howfine.task import Example, Task

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """How a readout that writes wants its texts written."""

    # Tokens at most, the end among them.
    most: int
    # Hypotheses of a beam search; 1 takes the likeliest token each time.
    beams: int = 1
    # Power of the length that a hypothesis' log-likelihood is divided by.
    length_penalty: float = 1.0
    # (n, E) vectors of its own, which `Batch.marks` and `types` number: see `howfine.vectors`.
    own: Tensor | None = field(default=None, compare=False)

    @property
    def search(self) -> tuple[int, float, int]:
        """What texts that are written together have in common.

        Beams are compared at the end, so that this must be the same for all.
        """
        return (self.beams, self.length_penalty, self.most) if self.beams > 1 else (1, 1.0, 0)


class Head(nn.Module, ABC):
    """A readout's own parameters. Its forward runs the towers and returns (B, …) outputs."""

    @property
    def asked(self) -> Asked | None:
        """How texts are to be written, where the readout writes."""
        return None

    @abstractmethod
    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        """Outputs of a batch: logits (B, classes), or scores (B,)."""


class Readout(ABC):
    """Examples to a Batch; outputs to a loss and predictions; its own small parameters.

    Subclasses are final, frozen dataclasses with at most six fields. `labels` are the task's class
    names, () for regression and for texts.
    """

    # Which kind of base it needs: see `howfine.base.KINDS`.
    kind: ClassVar[str] = "body"
    # Whether it reads an example's own options, in tasks that have such.
    reads_options: ClassVar[bool] = False
    # Whether its answers are texts.
    writes: ClassVar[bool] = False
    # Whether it gives pictures and captions directions to be compared, instead of answers.
    aligns: ClassVar[bool] = False

    @property
    def gives(self) -> str:
        """What kind of task it answers, as `howfine.checks.answerable` has it."""
        if self.aligns:
            return ALIGNMENT
        return GENERATION if self.writes else CLASSIFICATION

    @property
    def goes_on(self) -> bool:
        """Whether a stored head holds what a later phase would train on."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether a stored head holds what the whole model made of the training examples."""
        return False

    @property
    def adds_up(self) -> bool:
        """Whether a batch's loss is the mean of those of its equal parts."""
        return True

    def __init_subclass__(cls) -> None:
        if cls.__bases__ != (Readout,):
            raise TypeError(f"{cls.__name__}: readouts are final; wrap one instead of subclassing")

    @abstractmethod
    def attach(self, base: Base, labels: Labels) -> Head:
        """A freshly initialised, trainable head."""

    def of_task(self, task: Task) -> Readout:
        """The same readout with nothing left for the task's examples to say."""
        return self

    def settled(self, base: Base, labels: Labels = ()) -> Readout:
        """The same readout with nothing left for base and task to say: what a delta stores."""
        return self

    @property
    def slots(self) -> tuple[str, ...]:
        """The free positions in each of its inputs (`Batch.slots`): a word to begin with, or ""."""
        return ()

    @abstractmethod
    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        """A padded batch of examples, with targets if `labelled`."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The training loss, a scalar."""

    def learned(self, outputs: Tensor) -> Tensor:
        """(B, …, K) logits or scores among the outputs: what the loss is of."""
        return outputs

    def imitation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """How far outputs are from answers that they are to be like, a scalar.

        KL(taught ‖ outputs) of the classes' probabilities, or the mean squared error of scores.
        `taught` is what `learned` gives of other outputs, or (B, K) of any readout: logits, or
        scores. Raises SettingError for readouts whose outputs are neither.
        """
        if self.writes or self.aligns:
            raise SettingError(
                f"{type(self).__name__} has no classes or scores that another one's could be like; "
                "let nothing of the loss be learned from other outputs (distil=0)"
            )
        outputs = self.learned(outputs)
        if taught.ndim < outputs.ndim:  # one answer, given in several places
            taught = taught.unsqueeze(1)
        if outputs.shape[-1] == 1:
            return functional.mse_loss(outputs.float(), taught.float())
        log_p, log_q = taught.float().log_softmax(-1), outputs.float().log_softmax(-1)
        parts = torch.where(log_p.isfinite(), log_p.exp() * (log_p - log_q), 0)
        return parts.sum(-1).mean()

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """(B,) class indices, or scores for regression."""

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(B, classes) in float64, rows that sum to 1 and are highest at `predict`'s class.

        Softmax of logits. Only asked for tasks with labels.
        """
        return outputs.double().softmax(-1)

    def predictions(self, base: Base, outputs: Tensor) -> np.ndarray:
        """(B,) what a metric takes: class indices, scores, or texts."""
        return self.predict(outputs).numpy()

    def told(self, base: Base, labels: Labels, outputs: Tensor) -> list[dict[str, Any]]:
        """What is told of each row: `label` and `probability`, `score`, or `text`."""
        found = self.predictions(base, outputs)
        if self.writes:
            return [{"text": text} for text in found]
        if not labels:
            return [{"score": float(value)} for value in found]
        shares = self.probabilities(outputs)
        return [
            {"label": labels[int(index)], "probability": float(row[int(index)])}
            for index, row in zip(found, shares, strict=True)
        ]

    def progress(self, outputs: Tensor, targets: np.ndarray, metric: Metric) -> float:
        """By what states of one training are compared, more is better: the task's metric."""
        return float(metric.function(self.predict(outputs).numpy(), targets))

    # A hook, not a duty: most readouts need nothing of the kind.
    def remember(self, model: Wired, base: Base, examples: Sequence[Example]) -> None:  # noqa: B027
        """Keep in the head what answers need of the training examples, such as class means.

        Called before each evaluation in training and before a change is packed.
        """

    def pack(self, head: Head) -> Tensors:
        """The head's tensors."""
        return {name: value.detach().clone() for name, value in head.state_dict().items()}

    def packed_shapes(self, base: Base, labels: Labels) -> dict[str, tuple[int, ...]]:
        """Shapes of what `pack` gives, by name; no memory is taken for them.

        Labels are words of a file, and any number of them costs little there.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    packed = self.pack(self.attach(base, labels))
            except (RuntimeError, NotImplementedError):  # a plugin's head that needs real tensors
                packed = self.pack(self.attach(base, labels))
        return {name: tuple(value.shape) for name, value in packed.items()}

    def check_fits(self, base: Base, labels: Labels, tensors: Tensors) -> None:
        """Raises DamagedDelta where tensors are not of the shapes that a head has."""
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        expected = self.packed_shapes(base, labels)
        if found != expected:
            raise DamagedDelta(
                f"readout tensors don't fit the base {base.name}: found {found}, expected "
                f"{expected}; the file is damaged, or made for another model"
            )

    def unpack(self, base: Base, labels: Labels, tensors: Tensors) -> Head:
        """A head with stored tensors. Raises DamagedDelta where they don't fit."""
        self.check_fits(base, labels, tensors)
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
            head = self.attach(base, labels)
        head.load_state_dict(tensors)
        return head.to(base.device)


def class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B, K) logits, or the mean squared error of (B, 1) scores; a scalar."""
    if outputs.shape[-1] == 1:
        return functional.mse_loss(outputs.float().squeeze(-1), targets.float())
    return functional.cross_entropy(outputs.float(), targets)


def class_answer(outputs: Tensor) -> Tensor:
    """(B,) the class of the highest of (B, K) logits, or (B, 1) scores as they are."""
    return outputs.squeeze(-1).float() if outputs.shape[-1] == 1 else outputs.argmax(-1)


class Wired(nn.Module):
    """A base with a readout's head, as one module: what Trainer trains and `evaluate` runs."""

    # Trainer then divides the loss by the accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, base: Base, readout: Readout, head: Head, dropout: bool = True) -> None:
        super().__init__()
        self._dropout = dropout
        self._base = base
        self.towers = base.towers
        self.head = head.to(base.device)
        self.readout = readout

    def train(self, mode: bool = True) -> Wired:
        """As in torch, but frozen blocks below the change stay in evaluation mode: `Base.train`."""
        super().train(mode)
        if mode and self._dropout:
            self._base.train()
        elif mode:
            for module in self.modules():  # what trains knows it; all else computes as in use
                own = module.parameters(recurse=False)
                module.training = any(parameter.requires_grad for parameter in own)
            # Not its dropout: that they train is for the head to know, and for the loss's penalty.
            self.training = self.head.training = True
        return self

    def state_dict(  # type: ignore[override]
        self, *args: Any, prefix: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """What trains, and gates' own state: a checkpoint of training need not hold the base."""
        kept = {name for name, value in self.named_parameters() if value.requires_grad}
        kept |= {name for name, _ in self.named_buffers() if ".parametrizations." in name}
        whole = super().state_dict(*args, prefix=prefix, **kwargs)
        return {name: whole[name] for name in whole if name.removeprefix(prefix) in kept}

    def forward(self, **fields: Any) -> dict[str, Tensor]:
        """Takes a Batch's fields; gives `logits` and, with targets, `loss`."""
        batch = Batch.from_kwargs(fields)
        with running(batch):
            outputs = self.head(self.towers, batch)
        if batch.targets is None:
            return {"logits": outputs}
        return {"loss": self.readout.loss(outputs, batch.targets), "logits": outputs}


def readouts() -> dict[str, type[Readout]]:
    """Every readout by name."""
    return plugins.registry("readouts", Readout)


def readout(name: str, **settings: Any) -> Readout:
    """A readout by name. Raises SettingError with the near name for what is unknown."""
    return plugins.build("readout", readouts(), name, settings)
