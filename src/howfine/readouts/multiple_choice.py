"""Every task as multiple choice: a mask in front of each option, and "yes" at the right one.

Yang et al. 2022, "Zero-shot learners for natural language understanding via a unified multiple
choice perspective" (UniMC), in the mechanics of the authors' released code:

    [CLS] [MASK] option 1 [MASK] option 2 … [SEP] question [SEP] text [SEP] pair [SEP]

An option sees itself, the question and the texts, but no other option, and positions start anew in
each: scores do not depend on the options' order. The score of an option is the masked language
model's logit of "yes" at its mask. There are no parameters of its own: with a base that was trained
so on other tasks, it answers a new one untrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from howfine import choices, language
from howfine.base import Base
from howfine.batch import Batch
from howfine.errors import SettingError, TaskError
from howfine.readout import Head, Labels, Readout
from howfine.task import Example, Task

# What is added to the logit of a place that is no option's, as in the authors' code.
NEVER = -10_000.0
# In training, the share of a text's tokens that are guessed, and how often it is drawn.
RATES = torch.tensor([0.0, 0.1, 0.2, 0.3])
CHANCES = torch.tensor([0.30, 0.30, 0.25, 0.15])


@dataclass(frozen=True)
class MultipleChoice(Readout):
    """The options, what is asked, and which losses train."""

    kind = "masked_or_causal_lm"
    reads_options = True

    # An option for each class in the labels' order; {text} and {pair} in it stand for the texts.
    # None: the class names, or each example's own options.
    options: tuple[str, ...] = ()
    # What is asked of every example; "" for nothing.
    question: str = ""
    # Tokens kept of an input; texts are cut first, then options.
    max_length: int = 256
    # The words that say that an option is right, and wrong; one token each.
    answers: tuple[str, str] = ("yes", "no")
    # Whether options see no other option and each has positions of its own.
    apart: bool = True
    # The losses: of choosing the option and of guessing words ("both"), or one of them.
    objective: Literal["both", "choice", "words"] = "both"

    def __post_init__(self) -> None:
        if self.max_length < 8 or len(set(self.answers)) != 2:
            raise SettingError(
                f"multiple_choice: found max_length {self.max_length} and answers "
                f"{self.answers}, expected 8 at least and two different words"
            )
        choices.check(self.options)

    @property
    def adds_up(self) -> bool:
        return self.objective == "choice"  # the words' loss is a mean over tokens

    def attach(self, base: Base, labels: Labels) -> Head:
        language.require(base, "readout multiple_choice", (language.MASKED,))
        if not base.anatomy.plain_attention:
            raise SettingError(
                f"multiple_choice keeps options apart by positions and an attention mask, which "
                f"{base.config.model_type} takes no account of in that form; give another base"
            )
        if not labels:
            raise SettingError(
                "multiple_choice needs classes, and this task is a regression; use classifier"
            )
        if self.options and len(self.options) != len(labels):
            raise SettingError(
                f"multiple_choice options: found {len(self.options)}, expected {len(labels)}: one "
                f"for each of {list(labels)}"
            )
        return _Chooser(base, self, labels)

    def of_task(self, task: Task) -> MultipleChoice:
        """With the class names as options, where none are given and examples have none.

        The classes of examples that have some are numbers, and mean nothing without them.
        """
        if self.options or all(example.options for example in task.splits["train"]):
            return self
        return replace(self, options=task.labels)

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        rows = [choices.row(base, self, example) for example in examples]
        batch = choices.padded(base, rows, self.apart)
        if labelled:
            batch.targets = torch.tensor([example.label for example in examples])
        return batch

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scores, words = outputs[:, :-1].float(), outputs[:, -1].float().mean()
        choice = functional.cross_entropy(scores, targets)
        return {"both": choice + words, "choice": choice, "words": words}[self.objective]

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1].argmax(-1)

    def learned(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1]

    def probabilities(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1].double().softmax(-1)


class _Chooser(Head):
    """Logits of "yes" at the options' masks, and each row's share of the word-guessing loss.

    Outputs are (B, K + 1): K scores, NEVER where an example has fewer options, and the loss.
    """

    def __init__(self, base: Base, settings: MultipleChoice, labels: Labels) -> None:
        super().__init__()
        self.tower_name, self.body_path = base.tower_name, base.body_path
        self.reading = language.before_decoder(base)
        self.classes = len(labels)
        yes, no = (language.single_token(base, word, "answer") for word in settings.answers)
        self.yes, self.no = yes, no
        self.mask, self.vocabulary = base.tokenizer.mask_token_id, base.embedding.num_embeddings
        self.guesses = settings.objective != "choice"

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        assert batch.reads is not None
        slots, starts = batch.reads[:, :-1], batch.reads[:, -1]
        if slots.shape[1] > self.classes:
            raise TaskError(
                f"an example has {slots.shape[1]} options and the task {self.classes} classes; "
                "expected as many at most"
            )
        inputs = dict(batch.inputs)
        guessed = None
        if self.guesses and batch.targets is not None:
            # Nothing is hidden in evaluation: the options' masks alone are guessed.
            none = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            guessed = self._hide(inputs, starts) if self.training else none
        state = towers.get_submodule(self.body_path)(**inputs).last_hidden_state
        tower = towers[self.tower_name]
        rows = torch.arange(state.shape[0], device=state.device).unsqueeze(1)
        there = slots >= 0
        read = self.reading(tower, state[rows, slots.clamp(min=0)])
        decoder = tower.get_output_embeddings()  # type: ignore[operator]
        answers = functional.linear(
            read, decoder.weight[[self.yes, self.no]], decoder.bias[[self.yes, self.no]]
        )
        scores = answers[..., 0].float().masked_fill(~there, NEVER)
        scores = functional.pad(scores, (0, self.classes - scores.shape[1]), value=NEVER)
        loss = scores.new_zeros(len(scores))
        if guessed is not None and batch.targets is not None:
            words = (batch.inputs["input_ids"], guessed, state)
            loss = self._words(tower, read, there, batch.targets, *words)
        return torch.cat([scores, loss.unsqueeze(1)], dim=1)

    def _hide(self, inputs: dict[str, Tensor], starts: Tensor) -> Tensor:
        """Replace some tokens behind the options: (B, S), which of them are to be guessed.

        Of those 80 % become the mask, 10 % stay, 10 % become any token.
        """
        ids = inputs["input_ids"]
        real = inputs["attention_mask"][:, 0, 0] == 0  # the first token sees every real one
        rates = RATES[torch.multinomial(CHANCES, len(ids), replacement=True)].to(ids.device)
        drawn = torch.rand(ids.shape, device=ids.device) / rates.unsqueeze(1).clamp(min=1e-9)
        places = torch.arange(ids.shape[1], device=ids.device)
        chosen = (drawn < 1) & (places >= starts.unsqueeze(1)) & real
        anything = torch.randint_like(ids, self.vocabulary)
        made = torch.where(drawn < 0.8, self.mask, torch.where(drawn < 0.9, ids, anything))
        inputs["input_ids"] = torch.where(chosen, made, ids)
        return chosen

    def _words(
        self,
        tower: nn.Module,
        read: Tensor,
        there: Tensor,
        gold: Tensor,
        ids: Tensor,
        chosen: Tensor,
        state: Tensor,
    ) -> Tensor:
        """(B,) whose mean is the mean loss over all options' masks and all guessed tokens."""
        decoder = tower.get_output_embeddings()  # type: ignore[operator]
        right = torch.arange(there.shape[1], device=gold.device) == gold.unsqueeze(1)
        wanted = torch.where(right, self.yes, self.no)
        read = torch.cat([read[there], self.reading(tower, state[chosen])])
        targets = torch.cat([wanted[there], ids[chosen]])
        each = functional.cross_entropy(decoder(read).float(), targets, reduction="none")
        row = torch.cat([there.nonzero()[:, 0], chosen.nonzero()[:, 0]])
        sums = each.new_zeros(len(gold)).index_add(0, row, each)
        return sums * len(gold) / len(each)


EXAMPLE = MultipleChoice(options=("w1 w2", "w3"), question="w4", answers=("w5", "w6"))
