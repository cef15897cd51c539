"""Tiny random models, built from configs without a download, a tiny task, and a tiny fit.

Weights are drawn wide, and one-dimensional parameters away from their usual 0 and 1, so that
attention is far from uniform and no bias or norm is without effect: a wrong mask, a lost bias or
padding that leaks then shows in the outputs.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from howfine.base import Base, TwoTowers
from howfine.batch import Batch
from howfine.change import Change
from howfine.delta import Delta
from howfine.images import Picture
from howfine.method import Gradient, Method
from howfine.probe import GradientProbe
from howfine.readout import Head, Readout, Wired, readout
from howfine.task import Example, Task

HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 4
WORDS = tuple(f"w{i}" for i in range(90))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB = len(SPECIAL) + len(WORDS)
LABELS = ("no", "yes")
READOUT = readout("classifier", max_length=32)

_STACK = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
_WIDE = {"initializer_range": 0.2}
_TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "hidden_size": HIDDEN}
_IDS = {"bos_token_id": 2, "eos_token_id": 3}
_BERT_LIKE = {**_TEXT, **_STACK, **_WIDE, "max_position_embeddings": 64}
_LLAMA_LIKE = {**_BERT_LIKE, **_IDS, "num_key_value_heads": 2, "head_dim": HIDDEN // HEADS}
_IMAGE = {**_STACK, **_WIDE, "hidden_size": HIDDEN, "image_size": 8, "patch_size": 4}

# Name -> class prefix in transformers and the settings of its config.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT_LIKE),
    "roberta": ("Roberta", {**_BERT_LIKE, **_IDS}),
    "electra": ("Electra", {**_BERT_LIKE, "embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2",
        {
            **_BERT_LIKE,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 16,
            "position_biased_input": False,
        },
    ),
    "mpnet": ("MPNet", {**_BERT_LIKE, **_IDS}),
    "albert": ("Albert", {**_BERT_LIKE, **_IDS, "embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        {
            **_WIDE,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": INNER,
            "max_position_embeddings": 64,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            **_WIDE,
            **_IDS,
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_positions": 64,
        },
    ),
    "llama": ("Llama", _LLAMA_LIKE),
    "qwen3": ("Qwen3", _LLAMA_LIKE),
    "gemma2": ("Gemma2", {**_LLAMA_LIKE, "sliding_window": 16}),
    "t5": (
        "T5",
        {
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "decoder_start_token_id": 0,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": INNER,
            "num_layers": LAYERS,
            "num_heads": HEADS,
        },
    ),
    "bart": (
        "Bart",
        {
            **_IDS,
            "vocab_size": VOCAB,
            "pad_token_id": 0,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "max_position_embeddings": 64,
            "init_std": 0.2,
        },
    ),
    "vit": ("ViT", _IMAGE),
    "dinov2": ("Dinov2", {**_IMAGE, "mlp_ratio": INNER // HIDDEN}),
}
# Layers of the encoder and of the decoder. (transformers makes no cache for a T5 with E < D.)
E, D = 3, 2
# Name -> class of the model with its head, and the settings of its config.
_T5 = TINY["t5"][1] | {"num_layers": E, "num_decoder_layers": D}
_BART = TINY["bart"][1] | {"encoder_layers": E, "decoder_layers": D}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "mbart": ("MBartForConditionalGeneration", _BART),
    "pegasus": ("PegasusForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _BART),
}
# Without a [CLS] in front: what a causal or a T5 tokenizer gives.
_CAUSAL = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
_PLAIN = ("gpt2", "llama", "qwen3", "gemma2", "t5")


def tiny_tower(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The body of a tiny model as `Base.load` would find it; `changes` to its config."""
    prefix, settings = TINY[name]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.get_encoder() if config.is_encoder_decoder else model


def tiny_language_base(name: str, seed: int = 0, **changes: Any) -> Base:
    """A tiny masked language model with its head; a causal one where there is no masked one."""
    prefix, settings = TINY[name]
    masked = hasattr(transformers, f"{prefix}ForMaskedLM")
    cls = getattr(transformers, f"{prefix}ForMaskedLM" if masked else _CAUSAL[name])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(getattr(transformers, f"{prefix}Config")(**{**settings, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = tiny_tokenizer(name not in _PLAIN)
    kind = "masked_lm" if masked else "causal_lm"
    return Base(f"tiny-{name}-lm", model, tokenizer, kind=kind)


def tiny_whole(name: str, kernel: str = "sdpa", seed: int = 0, **changes: Any) -> Base:
    """A tiny encoder-decoder with its head and no dropout; a generation ends by its length only."""
    cls = getattr(transformers, WHOLE[name][0])
    silent = {"dropout": 0.0, "dropout_rate": 0.0, "eos_token_id": None}
    known = {key: value for key, value in silent.items() if hasattr(cls.config_class(), key)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(cls.config_class(**{**WHOLE[name][1], **known, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.forced_eos_token_id = None
    model.set_attn_implementation(kernel)
    return Base(f"tiny-{name}-whole", model, tiny_tokenizer(False), kind="seq2seq_lm")


def tiny_writer(name: str, seed: int = 0, **changes: Any) -> Base:
    """A tiny causal language model whose tokenizer knows a beginning, [CLS], and an end, [SEP]."""
    base = tiny_language_base(name, seed, **changes)
    base.tokenizer.bos_token, base.tokenizer.eos_token = "[CLS]", "[SEP]"
    return base


def written_task() -> Task:
    """Of 3 to 8 words the first and the last are to be written; later rows have two references."""
    numbers = random.Random(0)
    examples = []
    for number in range(32):
        words = numbers.choices(WORDS, k=numbers.randint(3, 8))
        targets = (f"{words[0]} {words[-1]}", f"{words[-1]} {words[0]}")
        examples.append(Example((" ".join(words),), targets=targets[: 1 + (number >= 16)]))
    splits = {"train": examples[:16], "dev": examples[16:24], "test": examples[24:]}
    return Task("tiny-written", splits, (), "rouge_l", "drawn at random, seed 0")


def tiny_tokenizer(pair: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word: `[CLS] a [SEP] b [SEP]` where `pair`, the words alone otherwise."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=padding_side,
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def tiny_base(name: str, seed: int = 0, padding_side: str = "right", **changes: Any) -> Base:
    """A tiny base; `changes` to its config."""
    tower = tiny_tower(name, seed, **changes)
    if tower.main_input_name == "pixel_values":
        return Base(f"tiny-{name}", tower)
    return Base(f"tiny-{name}", tower, tiny_tokenizer(name not in _PLAIN, padding_side))


def tiny_task(pair: bool = False) -> Task:
    """Sentences of 3 to 12 words; "yes" where the first word is among the first half."""
    numbers = random.Random(0)
    examples = []
    for _ in range(32):
        words = [numbers.choices(WORDS, k=numbers.randint(3, 12)) for _ in range(1 + pair)]
        label = int(words[0][0] in WORDS[: len(WORDS) // 2])
        examples.append(Example(tuple(" ".join(text) for text in words), label))
    splits = {"train": examples[:16], "dev": examples[16:24], "test": examples[24:]}
    return Task("tiny", splits, LABELS, "accuracy", "drawn at random, seed 0")


def png(seed: int, size: int = 8, ending: str = "PNG") -> bytes:
    """An image file of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(noise).save(held, ending)
    return held.getvalue()


def tiny_towers(image: str = "vit", text: str = "bert", **changes: Any) -> TwoTowers:
    """A tiny base of two towers; `changes` to the text tower's config."""
    return TwoTowers(tiny_base(image), tiny_base(text, **changes))


def captioned_task(pictures: int = 12, captions: int = 2) -> Task:
    """Pictures of noise, each with captions of its own; the same in train, dev and test."""
    numbers = random.Random(0)
    examples = [
        Example((" ".join(numbers.choices(WORDS, k=numbers.randint(3, 9))),), picture=picture)
        for picture in (Picture(f"noise {n}", png(n)) for n in range(pictures))
        for _ in range(captions)
    ]
    splits = dict.fromkeys(("train", "dev", "test"), examples)
    return Task("tiny-captions", splits, (), "mean_recall", "drawn at random, seed 0")


class TinyProbe:
    """The tiny task as seen through a readout, in two batches: see `howfine.method.Probe`.

    With a base, there is a start: its weights, each moved a little.
    """

    def __init__(self, readout: Readout, base: Base | None = None) -> None:
        self.readout = readout
        self.start = tuned_weights(base) if base else {}
        self.outside: dict[str, Tensor] = {}
        self.slots = readout.slots
        self.begun: dict[str, Tensor] = {}

    def gradients(
        self,
        base: Base,
        paths: list[str],
        of: Gradient = "magnitude",
        at: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        return self._probe(base).gradients(base, paths, of, at)

    def sensitivities(
        self,
        base: Base,
        counts: Mapping[str, int],
        at: Mapping[str, Tensor] | None = None,
        *,
        positions: bool = False,
        rows: int | None = None,
    ) -> dict[str, Tensor]:
        probe = self._probe(base)
        return probe.sensitivities(base, counts, at, positions=positions, rows=rows)

    def runs(
        self, base: Base, at: Mapping[str, Tensor] | None = None, *, rows: int | None = None
    ) -> Iterator[Batch]:
        return self._probe(base).runs(base, at, rows=rows)

    def _probe(self, base: Base) -> GradientProbe:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wired = Wired(base, self.readout, self.readout.attach(base, LABELS))
        return GradientProbe(wired, base, tiny_task().splits["train"], 8)


def tuned_weights(base: Base) -> dict[str, Tensor]:
    """What fine-tuning might have made of every parameter of a base; the same each time."""
    generator = torch.Generator().manual_seed(1)
    return {
        path: base.parameter(path).detach()
        + 0.1 * torch.randn(base.parameter(path).shape, generator=generator)
        for path in base.paths()
    }


def probe_for(chosen: Method, read: Readout, base: Base) -> TinyProbe:
    """A probe, with a start where the method needs one."""
    return TinyProbe(read, base if chosen.start == "needed" else None)


def owner_of(base: Base, path: str) -> tuple[nn.Module, str]:
    """(module, attribute) of a parameter's path."""
    module, _, attribute = path.rpartition(".")
    return base.towers.get_submodule(module), attribute


def weight_at(base: Base, path: str) -> Tensor:
    """The tensor that the forward pass would read at a path, gates applied; a copy."""
    module, attribute = owner_of(base, path)
    return getattr(module, attribute).detach().clone()


def matrices_of(base: Base) -> list[str]:
    """Paths of the blocks' matrices, told by shape and name alone."""
    return [
        path
        for path, parameter in base.towers.named_parameters()
        if parameter.ndim == 2
        and any(char.isdigit() for char in path)
        and not any(word in path.lower() for word in ("embed", "norm", "relative_attention_bias"))
    ]


@dataclass
class Fitted:
    """A method trained a little, still on its base."""

    base: Base
    method: Method
    change: Change
    head: Head
    wired: Wired

    def delta(self, store: str = "fp32") -> Delta:
        return Delta.pack(
            self.base, self.method, self.change, self.wired.readout, self.head, LABELS, store
        )

    def logits(self) -> Tensor:
        return logits_of(self.wired, self.base)


def wire(base: Base, chosen: Method, read: Readout = READOUT) -> Fitted:
    """The method and a readout put on a base, untrained."""
    change = chosen.attach(base, probe_for(chosen, read, base))
    head = read.attach(base, LABELS)
    return Fitted(base, chosen, change, head, Wired(base, read, head))


def optimiser_of(fitted: Fitted, rate: float = math.inf) -> torch.optim.AdamW:
    """AdamW with steps of each parameter's own size: ±5 logits flip and weights stay finite.

    Or with steps of `rate`, where that is smaller.
    """
    groups = []
    for group in fitted.method.groups(fitted.change):
        for parameter in group["params"]:
            size = parameter.detach().float().square().mean().sqrt().item()
            decay = group.get("weight_decay", 0.01)
            lr = min(max(size, 0.05), rate)
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    groups.append({"params": list(fitted.head.parameters()), "lr": min(0.05, rate)})
    return torch.optim.AdamW(groups)


def fit_a_little(
    base: Base,
    chosen: Method,
    steps: int = 3,
    seed: int = 0,
    readout: Readout = READOUT,
    rate: float = math.inf,
) -> Fitted:
    """Attach, train `steps` batches with dropout on, and leave the change on, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fitted = wire(base, chosen, readout)
        optimiser = optimiser_of(fitted, rate)
        fitted.wired.train()
        for step in range(steps):
            loss = loss_of(fitted, step)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        fitted.wired.eval()
    return fitted


def loss_of(fitted: Fitted, step: int = 0) -> Tensor:
    """Loss of a training batch, with the penalty."""
    examples = tiny_task().splits["train"]
    batch = fitted.wired.readout.collate(fitted.base, examples[step % 2 * 8 :][:8])
    loss = fitted.wired(**batch.as_kwargs())["loss"]
    return loss + fitted.method.penalty(fitted.change, step / 3)


@torch.no_grad()
def logits_of(wired: Wired, base: Base, examples: Sequence[Example] | None = None) -> Tensor:
    examples = tiny_task().splits["dev"] if examples is None else examples
    batch = wired.readout.collate(base, examples, labelled=False)
    return wired(**batch.as_kwargs())["logits"]
