"""An oracle for LilT, written from its equations alone.

Khan & Fu, "Contrastive Alignment of Vision to Language Through Parameter-Efficient Transfer
Learning" (ICLR 2023): counts of trained parameters, the symmetric InfoNCE loss as plain loops, the
layerwise and the deep adapter as plain tensor algebra in float64.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from howfine.base import Base, TwoTowers
from howfine.change import Change
from howfine.images import Picture
from howfine.method import Method, method
from howfine.readout import Readout, Wired, readout
from howfine.task import Example
from tiny import HEADS, HIDDEN, LAYERS, tiny_base, tiny_tokenizer, tiny_tower

WIDTH, SIZE, PATCH = 16, 8, 4
# CLIP's, of pixels between 0 and 1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Settings = dict[str, dict[str, Any]]
Weights = Callable[[str], Tensor]


# --- what is built -----------------------------------------------------------------------------


def layerwise(reduction: int = 4, std: float = 0.02, beside: Sequence[str] = ("norm",)) -> Settings:
    """LilT's LwA, with all LayerNorms unless told otherwise."""
    made = {"placement": "layerwise", "reduction": reduction, "activation": "gelu", "std": std}
    return {"adapter": {**made, "beside": tuple(beside)}}


def select(*train: str) -> Settings:
    return {"select": {"train": list(train)}}


DEEP: Settings = {"deep": {"beside": ("norm",)}}


def both(settings: Settings) -> Method:
    """One method for both towers."""
    return method("towers", image=settings, text=settings)


def towers(image: str = "vit", seed: int = 0, **text: Any) -> TwoTowers:
    """A tiny pair as the paper has it: without poolers, so that the CLS row is read."""
    seen_by: Any = tiny_tower(image, seed)
    read_by: Any = tiny_tower("bert", seed, **text)
    for tower in (seen_by, read_by):
        if getattr(tower, "pooler", None) is not None:
            tower.pooler = None
    seen = Base(f"tiny-{image}", seen_by)
    # The paper's, whatever the image tower was trained with; the folder's own are taken otherwise.
    seen.preprocessing = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    return TwoTowers(seen, Base("tiny-bert", read_by, tiny_tokenizer()))


def png(seed: int, size: int = SIZE) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def pairs(pictures: Iterable[int], seed: int = 0, length: int = 0) -> list[Example]:
    """A pair for each picture's seed; captions of 1 to 9 words, or of `length` each."""
    numbers = np.random.default_rng([seed, 7])
    made = []
    for place, number in enumerate(pictures):
        count = length or int(numbers.integers(1, 10))
        words = " ".join(f"w{word}" for word in numbers.integers(0, 90, count))
        made.append(Example(texts=(words,), picture=Picture(f"{place}", png(number))))
    return made


def reader(**settings: Any) -> Readout:
    return readout("contrastive", **{"width": WIDTH, "size": SIZE, "max_length": 16, **settings})


def wired(base: TwoTowers, seed: int = 0, **settings: Any) -> Wired:
    """A readout put on a base, in evaluation mode."""
    read = reader(**settings)
    torch.manual_seed(seed)
    return Wired(base, read, read.attach(base, ())).eval()


def run(model: Wired, base: TwoTowers, examples: Sequence[Example]) -> dict[str, Tensor]:
    return model(**model.readout.collate(base, examples).as_kwargs())


def loss_now(model: Wired, base: TwoTowers, examples: Sequence[Example]) -> float:
    return float(run(model, base, examples)["loss"].detach())


def stir(change: Change, size: float = 0.3, seed: int = 0) -> None:
    """Move everything that trains, so that nothing is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in change.trainable.values():
            value.add_(size * torch.randn(value.shape, generator=generator))


def attached(chosen: Method, base: TwoTowers, seed: int = 0) -> Change:
    torch.manual_seed(seed)
    return chosen.attach(base)


# --- the oracle: inputs and towers -------------------------------------------------------------


def head_of(model: Wired) -> Any:
    return model.head


def pixels_of(examples: Sequence[Example]) -> Tensor:
    """(n, 3, size, size) CLIP's normalisation of the pictures' bytes, in float64."""
    made = []
    for example in examples:
        assert example.picture is not None
        shown = np.asarray(Image.open(io.BytesIO(example.picture.read())), dtype=np.float64) / 255
        made.append(((shown - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(made))


def tokens_of(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, padded to the longest."""
    found = tiny_tokenizer()([e.texts[0] for e in examples], padding=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w(f"{name}.weight").T + w(f"{name}.bias")


def layer_norm(x: Tensor, w: Weights, name: str, eps: float = 1e-12) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * w(f"{name}.weight") + w(f"{name}.bias")


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), not its approximation by tanh."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, S, d), head by head."""
    made = []
    for head in range(HEADS):
        part = slice(head * HIDDEN // HEADS, (head + 1) * HIDDEN // HEADS)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(HIDDEN // HEADS)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, -math.inf)
        made.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(made, -1)


class Adapter:
    """A(x) = x + W_up GELU(W_down x + b_down) + b_up."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: value.detach().double() for name, value in tensors.items()}

    def __call__(self, x: Tensor) -> Tensor:
        t = self.tensors
        inner = gelu(x @ t["down.weight"].T + t["down.bias"])
        return x + inner @ t["up.weight"].T + t["up.bias"]


def same(x: Tensor) -> Tensor:
    return x


Adapters = dict[tuple[int, int], Callable[[Tensor], Tensor]]


def vit_block(
    x: Tensor,
    w: Weights,
    path: str,
    adapters: Sequence[Callable[[Tensor], Tensor]] = (same, same),
    onto_skip: bool = False,
    scaled: bool = False,
) -> Tensor:
    """x ← x + γ Attn(LN1(A1(x))); x ← x + γ MLP(LN2(A2(x))).

    `onto_skip` is the other method, that it must not be: the skip carries A(x) then.
    """
    norms = ("norm1", "norm2") if scaled else ("layernorm_before", "layernorm_after")
    eps = 1e-6 if scaled else 1e-12
    inner = adapters[0](x)
    h = layer_norm(inner, w, f"{path}.{norms[0]}", eps)
    q, k, v = (linear(h, w, f"{path}.attention.{letter}_proj") for letter in "qkv")
    branch = linear(attend(q, k, v), w, f"{path}.attention.o_proj")
    gamma = w(f"{path}.layer_scale1.lambda1") if scaled else 1.0
    x = (inner if onto_skip else x) + gamma * branch
    inner = adapters[1](x)
    h = layer_norm(inner, w, f"{path}.{norms[1]}", eps)
    branch = linear(gelu(linear(h, w, f"{path}.mlp.fc1")), w, f"{path}.mlp.fc2")
    gamma = w(f"{path}.layer_scale2.lambda1") if scaled else 1.0
    return (inner if onto_skip else x) + gamma * branch


def bert_layer(
    h: Tensor,
    mask: Tensor,
    w: Weights,
    path: str,
    adapters: Sequence[Callable[[Tensor], Tensor]] = (same, same),
    behind: bool = False,
) -> Tensor:
    """h ← LN(A1(attention) + h); h ← LN(A2(MLP) + h).

    `behind` is what it must not be: the adapter after the residual sum.
    """
    q, k, v = (linear(h, w, f"{path}.attention.self.{n}") for n in ("query", "key", "value"))
    out = linear(attend(q, k, v, mask), w, f"{path}.attention.output.dense")
    out = adapters[0](out + h) if behind else adapters[0](out) + h
    h = layer_norm(out, w, f"{path}.attention.output.LayerNorm")
    out = linear(gelu(linear(h, w, f"{path}.intermediate.dense")), w, f"{path}.output.dense")
    out = adapters[1](out + h) if behind else adapters[1](out) + h
    return layer_norm(out, w, f"{path}.output.LayerNorm")


def picture_tokens(pixels: Tensor, w: Weights) -> Tensor:
    """Patches through the convolution, CLS in front, positions added."""
    path, rows = "image.embeddings", []
    kernel = w(f"{path}.patch_embeddings.projection.weight").flatten(1)
    for top in range(0, SIZE, PATCH):
        for left in range(0, SIZE, PATCH):
            patch = pixels[:, :, top : top + PATCH, left : left + PATCH].flatten(1)
            rows.append(patch @ kernel.T + w(f"{path}.patch_embeddings.projection.bias"))
    first = w(f"{path}.cls_token").reshape(1, -1).expand(len(pixels), -1)
    return torch.stack([first, *rows], 1) + w(f"{path}.position_embeddings")


def word_tokens(ids: Tensor, w: Weights) -> Tensor:
    path = "text.embeddings"
    words = w(f"{path}.word_embeddings.weight")[ids]
    positions = w(f"{path}.position_embeddings.weight")[: ids.shape[1]]
    types = w(f"{path}.token_type_embeddings.weight")[0]
    return layer_norm(words + positions + types, w, f"{path}.LayerNorm")


def vision(pixels: Tensor, w: Weights, adapters: Adapters | None = None, **how: bool) -> Tensor:
    """Last hidden states of the image tower."""
    found = adapters or {}
    x = picture_tokens(pixels, w)
    stack = "image.encoder.layer" if how.get("scaled") else "image.layers"
    for n in range(LAYERS):
        both_of = [found.get((n, place), same) for place in (0, 1)]
        x = vit_block(x, w, f"{stack}.{n}", both_of, **how)
    return layer_norm(x, w, "image.layernorm", 1e-6 if how.get("scaled") else 1e-12)


def language(
    ids: Tensor, mask: Tensor, w: Weights, adapters: Adapters | None = None, behind: bool = False
) -> Tensor:
    """Last hidden states of the text tower."""
    found = adapters or {}
    h = word_tokens(ids, w)
    for n in range(LAYERS):
        both_of = [found.get((n, place), same) for place in (0, 1)]
        h = bert_layer(h, mask, w, f"text.encoder.layer.{n}", both_of, behind)
    return h


def weights(base: TwoTowers, change: Change | None = None) -> Weights:
    """Parameters by path: the trained ones where there are such."""

    def read(path: str) -> Tensor:
        found = change.trainable.get(path) if change else None
        return (base.original(path) if found is None else found).detach().double()

    return read


def adapters_of(chosen: Method, base: TwoTowers, change: Change, tower: str) -> Adapters:
    """(layer, place) -> adapter, of what is packed as `tower:adapter.layer.place.name`."""
    grouped: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, value in chosen.pack(base, change).items():
        if name.startswith(f"{tower}:adapter."):
            _, layer, place, inner = name.split(".", 3)
            grouped.setdefault((int(layer), int(place)), {})[inner] = value
    assert sorted(grouped) == [(n, place) for n in range(LAYERS) for place in (0, 1)]
    return {key: Adapter(tensors) for key, tensors in grouped.items()}


@torch.no_grad()
def states(base: TwoTowers, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Last hidden states of both towers, as the library has them now."""
    ids, mask = tokens_of(examples)
    seen = base.parts["image"].tower(pixel_values=pixels_of(examples).float())
    read = base.parts["text"].tower(input_ids=ids, attention_mask=mask)
    return seen.last_hidden_state, read.last_hidden_state


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Entries near each other, of states that are LayerNorm's, of size 1."""
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max()) < tolerance


# --- the oracle: the loss ----------------------------------------------------------------------


def unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def info_nce(
    v: Sequence[Sequence[float]],
    t: Sequence[Sequence[float]],
    tau: float,
    pictures: Sequence[Any] | None = None,
) -> float:
    """(L_i2t + L_t2i) / 2 of unit vectors in loops; a picture is no negative of itself."""
    b, names = len(v), list(pictures if pictures is not None else range(len(v)))
    similarity = [[sum(x * y for x, y in zip(v[i], t[j], strict=True)) for j in range(b)]
                  for i in range(b)]  # fmt: skip
    image_to_text = text_to_image = 0.0
    for i in range(b):
        kept = [j for j in range(b) if j == i or names[j] != names[i]]
        top = max(similarity[i][j] / tau for j in kept)
        total = sum(math.exp(similarity[i][j] / tau - top) for j in kept)
        image_to_text -= similarity[i][i] / tau - top - math.log(total)
        top = max(similarity[j][i] / tau for j in kept)
        total = sum(math.exp(similarity[j][i] / tau - top) for j in kept)
        text_to_image -= similarity[i][i] / tau - top - math.log(total)
    return (image_to_text / b + text_to_image / b) / 2


def drawn(b: int, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and texts that have something to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(b, width, generator=generator)
    t = v + torch.randn(b, width, generator=generator)
    return nn.functional.normalize(v, dim=-1), nn.functional.normalize(t, dim=-1)


def loss_of(v: Tensor, t: Tensor, tau: float, pictures: Sequence[int] | None = None) -> float:
    """The library's loss of given directions."""
    width = v.shape[1]
    names = torch.tensor(list(pictures if pictures is not None else range(len(v))))
    outputs = torch.cat([v, t], 1) / math.sqrt(tau)
    return float(reader(width=width).loss(outputs, names))


def named_gradients(model: Wired, change: Change) -> dict[str, Tensor]:
    """Gradients of all that trains; zeros where there is none."""
    every = {**change.trainable, **{f"head.{n}": p for n, p in head_of(model).named_parameters()}}
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.detach().clone()
        for name, value in every.items()
    }


def backward(
    model: Wired, base: TwoTowers, change: Change, examples: Sequence[Example]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    model.zero_grad(set_to_none=True)
    loss = run(model, base, examples)["loss"]
    loss.backward()
    return float(loss.detach()), named_gradients(model, change)


def assert_equal_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Equal to the tolerance, in shares of a tensor's largest entry where that is above 1."""
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        off = float((found[name] - value).abs().max())
        assert off < tolerance * max(1.0, float(value.abs().max())), f"{name}: {off}"


# --- (a) counts, section (d) of the specification ----------------------------------------------

# Width, layers and heads of the image tower; width, layers, heads and words of the text tower.
PAIRS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int, int]]] = {
    "tiny": ((192, 12, 3), (128, 2, 2, 30522)),
    "small": ((384, 12, 6), (512, 4, 8, 30522)),
    "base": ((768, 12, 12), (768, 12, 12, 30522)),
    "large": ((1024, 24, 16), (1024, 24, 16, 30522)),
    "mbert": ((768, 12, 12), (768, 12, 12, 119547)),
}
_MADE: dict[str, TwoTowers] = {}


def real_pair(name: str) -> TwoTowers:
    """A pair of the paper's sizes without any memory; methods are taken off again by their users.

    DeiT-III's blocks have LayerScale, which transformers' ViT has not and its Dinov2 has; the
    latter has a mask token too, 1024 numbers in 688 million.
    """
    if name in _MADE:
        return _MADE[name]
    (d_v, n_v, h_v), (d_t, n_t, h_t, words) = PAIRS[name]
    stack: dict[str, Any] = {
        "hidden_size": d_v,
        "num_hidden_layers": n_v,
        "num_attention_heads": h_v,
    }
    stack |= {"image_size": 256, "patch_size": 16}
    seen: PreTrainedModel
    with torch.device("meta"):
        if name == "large":
            seen = Dinov2Model(Dinov2Config(**stack, mlp_ratio=4))
        else:
            seen = ViTModel(ViTConfig(**stack, intermediate_size=4 * d_v), add_pooling_layer=False)
        config = BertConfig(
            vocab_size=words,
            hidden_size=d_t,
            num_hidden_layers=n_t,
            num_attention_heads=h_t,
            intermediate_size=4 * d_t,
        )
        read = BertModel(config, add_pooling_layer=False)
    _MADE[name] = TwoTowers(Base(name, seen), Base(name, read, tiny_tokenizer()))
    return _MADE[name]


def counted(name: str, image: Settings, text: Settings) -> tuple[int, int]:
    """(trained, all) parameters, inserted ones among both, with the default readout."""
    base = real_pair(name)
    head = readout("contrastive").attach(base, ())
    with method("towers", image=image, text=text).attach(base) as change:
        every = list(base.towers.parameters())
        trained = sum(value.numel() for value in every if value.requires_grad)
        assert trained == sum(value.numel() for value in change.trainable.values())
        whole = sum(value.numel() for value in every)
    heads = sum(value.numel() for value in head.parameters() if value.requires_grad)
    assert not any(value.requires_grad for value in base.towers.parameters())
    return trained + heads, whole + heads


def test_the_pair_of_the_paper_has_its_size() -> None:
    base = real_pair("base")
    sizes = {
        name: sum(value.numel() for value in part.towers.parameters())
        for name, part in base.parts.items()
    }
    assert sizes == {"image": 85_844_736, "text": 108_891_648}
    head = readout("contrastive").attach(base, ())
    shapes = {name: tuple(value.shape) for name, value in head.named_parameters()}
    assert shapes.pop("temperature") == ()
    assert sum(math.prod(shape) for shape in shapes.values()) == 393_728
    assert shapes["image_projection.weight"] == shapes["text_projection.weight"] == (256, 768)
    assert counted("base", {}, {}) == (393_729, 195_130_113)


@pytest.mark.parametrize(
    ("image", "text", "trained", "percent"),
    [
        pytest.param({}, {}, 393_729, "0.202", id="locked"),
        pytest.param(select("none"), select("none"), 393_729, "0.202", id="none"),
        pytest.param(select("norm"), select("norm"), 470_529, "0.241", id="LN"),
        pytest.param(select("bias"), select("bias"), 598_785, "0.307", id="BitFit"),
        pytest.param(
            select("norm", "bias"), select("norm", "bias"), 637_185, "0.327", id="LN+BitFit"
        ),
        pytest.param(DEEP, DEEP, 14_646_273, "6.998", id="DA"),
        pytest.param(layerwise(), layerwise(), 14_672_385, "7.009", id="LwA"),
        pytest.param({}, select("all"), 109_285_377, "56.006", id="LiT"),
        pytest.param(select("all"), select("all"), 195_130_113, "100.000", id="CLIP"),
    ],
)
def test_counts_of_the_base_pair(
    image: Settings, text: Settings, trained: int, percent: str
) -> None:
    """To the unit; the share is of all parameters, inserted ones among them."""
    found, whole = counted("base", image, text)
    assert found == trained
    assert f"{100 * found / whole:.3f}" == percent


# Of LwA and DA together there is no test: a tower has one method.


def test_layer_norms_alone() -> None:
    """76 800: embeddings, two a layer and the vision's last one, scale and shift each."""
    base = real_pair("base")
    found = base.choose(("norm",))
    assert sum(base.original(path).numel() for path in found) == 76_800
    assert len(found) == 2 * (2 * 12 + 1 + 2 * 12 + 1)


@pytest.mark.parametrize(
    ("reduction", "percent"),
    [(1, "22.70"), (2, "12.90"), (4, "7.01"), (8, "3.75"), (16, "2.04"), (32, "1.16")],
)
def test_shares_of_layerwise_adapters_by_reduction(reduction: int, percent: str) -> None:
    found, whole = counted("base", layerwise(reduction), layerwise(reduction))
    m = 768 // reduction
    assert found == 470_529 + 2 * 24 * (2 * 768 * m + m + 768)
    assert f"{100 * found / whole:.2f}" == percent


@pytest.mark.parametrize(
    ("name", "trained", "percent", "norms"),
    [
        ("tiny", 574_849, "5.49", "0.93"),
        ("small", 3_092_993, "5.81", "0.51"),
        ("large", 51_180_033, "7.43", "0.11"),
        ("mbert", 14_672_385, "5.28", "0.18"),
    ],
)
def test_counts_of_the_other_pairs(name: str, trained: int, percent: str, norms: str) -> None:
    found, whole = counted(name, layerwise(), layerwise())
    assert found == trained
    assert f"{100 * found / whole:.2f}" == percent
    found, whole = counted(name, select("norm"), select("norm"))
    assert f"{100 * found / whole:.2f}" == norms


def test_layer_scale_is_no_norm() -> None:
    base = towers("dinov2")
    assert any("lambda" in path for path in base.paths())
    assert not any("lambda" in path for path in base.choose(("norm",)))
    for chosen in (both(layerwise()), both(select("norm"))):
        with chosen.attach(base) as change:
            assert not any("lambda" in path for path in change.trainable)


# --- (b) the loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_loss_of_a_batch_in_loops(pooling: str) -> None:
    """Pictures and captions, through projections with biases, to the loss, all by hand."""
    base = towers()
    assert base.parts["image"].pooling == base.parts["text"].pooling == "cls"
    base.parts["text"].pooling = pooling
    model, examples = wired(base), pairs(range(7))
    with torch.no_grad():
        found = run(model, base, examples)
    w = weights(base)
    ids, mask = tokens_of(examples)
    text = language(ids, mask, w)
    pooled = {"image": vision(pixels_of(examples), w)[:, 0], "text": text[:, 0]}
    if pooling == "mean":
        kept = mask[:, :, None].double()
        pooled["text"] = (text * kept).sum(1) / kept.sum(1)
    ways = {}
    for name, state in pooled.items():
        projection = getattr(head_of(model), f"{name}_projection")
        way = state @ projection.weight.detach().double().T + projection.bias.detach().double()
        ways[name] = [unit(row) for row in way.tolist()]
    assert float(found["loss"]) == pytest.approx(info_nce(ways["image"], ways["text"], 0.07), 1e-5)
    expected = torch.cat([torch.tensor(ways["image"]), torch.tensor(ways["text"])], 1)
    assert close(found["logits"], expected.double() / math.sqrt(0.07), 1e-4)


def test_defaults_of_the_head() -> None:
    head: Any = readout("contrastive").attach(towers(), ())
    assert head.temperature.shape == ()
    assert float(head.temperature.detach()) == pytest.approx(0.07)
    assert all(value.requires_grad for value in head.parameters())
    assert head.image_projection.out_features == head.text_projection.out_features == 256
    assert head.image_projection.bias is not None
    assert head.text_projection.bias is not None


@pytest.mark.parametrize("tau", [0.001, 0.07, 0.5])
@pytest.mark.parametrize("b", [1, 2, 9])
def test_loss_in_loops(b: int, tau: float) -> None:
    v, t = drawn(b)
    expected = info_nce(v.double().tolist(), t.double().tolist(), tau)
    assert loss_of(v, t, tau) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_pairs_of_one_picture_are_not_each_others_negatives() -> None:
    """A deviation from the paper, whose targets are one-hot whatever the pictures are."""
    v, t = drawn(8)
    pictures = [5, 6, 5, 7, 8, 5, 9, 8]
    v = v[[pictures.index(name) for name in pictures]]
    known = v.double().tolist(), t.double().tolist()
    found = loss_of(v, t, 0.07, pictures)
    assert found == pytest.approx(info_nce(*known, 0.07, pictures), rel=1e-5)
    assert found < info_nce(*known, 0.07) - 1e-3


def test_swapping_the_modalities_changes_nothing() -> None:
    v, t = drawn(9)
    assert loss_of(v, t, 0.07) == pytest.approx(loss_of(t, v, 0.07), rel=1e-6)


def test_permuting_pairs_changes_nothing_and_permuting_texts_raises_the_loss() -> None:
    v, t = drawn(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    before = loss_of(v, t, 0.07)
    assert loss_of(v[order], t[order], 0.07) == pytest.approx(before, rel=1e-5)
    assert loss_of(v, t[order], 0.07) > before + 1


def test_permuting_examples_changes_nothing() -> None:
    base = towers()
    model, examples = wired(base), pairs([0, 1, 2, 1, 3, 4])
    loss = loss_now(model, base, examples)
    assert loss_now(model, base, examples[::-1]) == pytest.approx(loss, rel=1e-5)


def test_loss_at_the_start_is_about_ln_b() -> None:
    """Exactly where all directions are one; within a fifth at the paper's widths."""
    one = drawn(1)[0].expand(12, -1)
    assert loss_of(one, one, 0.07) == pytest.approx(math.log(12), rel=1e-5)
    wide: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    base = TwoTowers(tiny_base("vit", **wide), tiny_base("bert", **wide))
    for part in base.parts.values():
        part.pooling = "cls"
    b = 64
    for seed in range(3):
        model = wired(base, seed, width=256)
        loss = loss_now(model, base, pairs(range(b), seed))
        assert loss == pytest.approx(math.log(b), rel=0.2)


def test_perfect_alignment() -> None:
    """log(1 + (b - 1) exp(-1/τ)), which goes to 0 with τ."""
    b = 10
    for tau in (0.5, 0.07, 0.001):
        expected = math.log1p((b - 1) * math.exp(-1 / tau))
        assert loss_of(torch.eye(b), torch.eye(b), tau) == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )
    assert loss_of(torch.eye(b), torch.eye(b), 0.001) < 1e-6


@pytest.mark.parametrize(
    ("tau", "clamped"),
    [
        (5.0, 0.5),
        (0.5, 0.5),
        (0.2, 0.2),
        (0.001, 0.001),
        (1e-5, 0.001),
        (0.0, 0.001),
        (-3.0, 0.001),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_temperature_is_a_divisor_clamped_before_every_forward(
    tau: float, clamped: float, training: bool
) -> None:
    """In place, whether training or not; its gradient is that at the clamped value."""
    base = towers(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model, examples = wired(base), pairs(range(5))
    model.train(training)
    head_of(model).temperature.data.fill_(0.07)
    plain = run(model, base, examples)["logits"].detach().double() * math.sqrt(0.07)
    head_of(model).temperature.data.fill_(tau)
    found = run(model, base, examples)
    assert float(head_of(model).temperature.detach()) == pytest.approx(clamped, rel=1e-6)
    assert torch.allclose(found["logits"].double() * math.sqrt(clamped), plain, atol=1e-5)
    v, t = plain.split(WIDTH, 1)
    assert torch.allclose(v.norm(dim=1), torch.ones(5).double(), atol=1e-5)
    expected = info_nce(v.tolist(), t.tolist(), clamped)
    assert float(found["loss"].detach()) == pytest.approx(expected, rel=2e-4, abs=1e-5)
    found["loss"].backward()
    at = torch.tensor(clamped, dtype=torch.float64, requires_grad=True)
    scores = v @ t.T / at
    own = scores.diag()
    ((scores.logsumexp(1) - own).mean() + (scores.logsumexp(0) - own).mean()).div(2).backward()
    assert at.grad is not None
    slope = float(at.grad)
    assert float(head_of(model).temperature.grad) == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_temperature_stays_in_bounds_while_training() -> None:
    """Steps far beyond the bounds, up and down, are taken back before the next loss."""
    base = towers()
    model, examples = wired(base), pairs(range(6))
    for rate in (10.0, -10.0):
        optimiser = torch.optim.SGD([head_of(model).temperature], lr=abs(rate), maximize=rate < 0)
        for _ in range(3):
            loss = run(model, base, examples)["loss"]
            assert 0.001 <= float(head_of(model).temperature.detach()) <= 0.5 + 1e-7
            assert math.isfinite(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert not 0.001 <= float(head_of(model).temperature.detach()) <= 0.5


# --- (c) layerwise adapters --------------------------------------------------------------------


def test_the_oracle_is_the_towers_without_a_change() -> None:
    """What the later comparisons stand on."""
    for image in ("vit", "dinov2"):
        base, examples = towers(image), pairs(range(5))
        seen, read = states(base, examples)
        w = weights(base)
        assert close(seen, vision(pixels_of(examples), w, scaled=image == "dinov2"))
        assert close(read, language(*tokens_of(examples), w))
        batch = reader().collate(base, examples)
        assert torch.equal(batch.inputs["input_ids"], tokens_of(examples)[0])
        assert close(batch.inputs["pixel_values"], pixels_of(examples))


@pytest.mark.parametrize("image", ["vit", "dinov2"])
def test_layerwise_adapters_are_the_papers(image: str) -> None:
    """Ahead of LN on the branch of a ViT block, on the sublayer's output in a BERT layer.

    All that trains is moved, so that a wrong place, a LayerNorm that isn't trained or another GELU
    would show; the places that it must not be in give something else by far.
    """
    base, examples = towers(image), pairs(range(5))
    chosen, scaled = both(layerwise()), image == "dinov2"
    with attached(chosen, base) as change:
        stir(change)
        seen, read = states(base, examples)
        w, pixels = weights(base, change), pixels_of(examples)
        ahead = adapters_of(chosen, base, change, "image")
        inside = adapters_of(chosen, base, change, "text")
        assert close(seen, vision(pixels, w, ahead, scaled=scaled))
        assert not close(seen, vision(pixels, w, ahead, scaled=scaled, onto_skip=True), 0.1)
        assert close(read, language(*tokens_of(examples), w, inside))
        assert not close(read, language(*tokens_of(examples), w, inside, behind=True), 0.1)
        assert not close(seen, vision(pixels, w, scaled=scaled), 0.1)
        assert not close(read, language(*tokens_of(examples), w), 0.1)
    seen, read = states(base, examples)
    assert close(seen, vision(pixels, weights(base), scaled=scaled))
    assert close(read, language(*tokens_of(examples), weights(base)))


def test_widths_of_layerwise_adapters() -> None:
    """⌊d/r⌋, two a layer, no LayerNorm and no scale among their parameters."""
    base = towers()
    for reduction in (1, 3, 4, 32):
        chosen = both(layerwise(reduction, beside=()))
        with attached(chosen, base) as change:
            m = HIDDEN // reduction
            each = 2 * HIDDEN * m + m + HIDDEN
            found = sum(value.numel() for value in change.trainable.values())
            assert found == 2 * 2 * LAYERS * each
            assert len(change.trainable) == 2 * 2 * LAYERS * 4


def test_layerwise_adapters_start_small_and_not_at_zero() -> None:
    """σ = 0.02 in both matrices, zero biases; the towers compute something slightly different."""
    base, examples = towers(), pairs(range(5))
    before = states(base, examples)
    chosen = both(layerwise())
    with attached(chosen, base) as change:
        for tower in ("image", "text"):
            found = adapters_of(chosen, base, change, tower).values()
            for name in ("down", "up"):
                held = [adapter.tensors for adapter in found if isinstance(adapter, Adapter)]
                matrices = torch.cat([tensors[f"{name}.weight"].flatten() for tensors in held])
                assert float(matrices.std()) == pytest.approx(0.02, rel=0.1)
                assert abs(float(matrices.mean())) < 0.003
                assert all(not tensors[f"{name}.bias"].any() for tensors in held)
        after = states(base, examples)
    for one, other in zip(before, after, strict=True):
        off = float((one - other).abs().max())
        assert 0 < off < 0.1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_adapters_with_zero_up_are_the_frozen_towers(by_hand: bool, training: bool) -> None:
    """Bit for bit, with dropout on as well: it draws the same numbers."""
    base, examples = towers(), pairs(range(5))
    for part in base.parts.values():
        part.tower.train(training)
    torch.manual_seed(3)
    before = states(base, examples)
    chosen = both(layerwise(std=0.02 if by_hand else 0.0))
    with attached(chosen, base) as change:
        if by_hand:
            stir(change)
            with torch.no_grad():
                for path, value in change.trainable.items():
                    if ":up." in path:
                        value.zero_()
                    elif ":" not in path:
                        value.copy_(base.original(path))
        for part in base.parts.values():
            part.tower.train(training)
        torch.manual_seed(3)
        after = states(base, examples)
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))


def test_adapters_that_start_at_zero_learn() -> None:
    base, examples = towers(), pairs(range(6))
    with attached(both(layerwise(std=0.0)), base) as change:
        model = wired(base)
        _, gradients = backward(model, base, change, examples)
        moved = [name for name, value in gradients.items() if ":up.weight" in name and value.any()]
        assert len(moved) == 2 * 2 * LAYERS


def test_text_adapters_stand_behind_dropout() -> None:
    """A(dropout(x)) and not dropout(A(x)): with all dropped, what is left is A(0) in each layer."""
    base, examples = (
        towers(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0),
        pairs(range(3)),
    )
    chosen = both(layerwise())
    with attached(chosen, base) as change:
        stir(change)
        base.parts["text"].tower.train()
        _, read = states(base, examples)
        w = weights(base, change)
        found = adapters_of(chosen, base, change, "text")
        h = torch.zeros(read.shape, dtype=torch.float64)
        for n in range(LAYERS):
            for place, path in enumerate(("attention.output", "output")):
                left = found[n, place](torch.zeros_like(h))
                h = layer_norm(left + h, w, f"text.encoder.layer.{n}.{path}.LayerNorm")
    assert close(read, h)


@pytest.mark.parametrize("settings", [layerwise(), DEEP], ids=["LwA", "DA"])
def test_what_is_packed_is_what_was_there(settings: Settings) -> None:
    base, examples = towers(), pairs(range(5))
    chosen = both(settings)
    with attached(chosen, base) as change:
        stir(change)
        before = states(base, examples)
        packed = {name: value.clone() for name, value in chosen.pack(base, change).items()}
    again = towers()
    with chosen.unpack(again, packed):
        after = states(again, examples)
    assert all(torch.equal(*each) for each in zip(before, after, strict=True))


# --- (d) the deep adapter ----------------------------------------------------------------------


def test_deep_adapter_is_one_more_block() -> None:
    """The frozen tower's blocks, a new one, then the vision's final norm."""
    base, examples = towers(), pairs(range(5))
    chosen = both(DEEP)
    with attached(chosen, base) as change:
        stir(change)
        seen, read = states(base, examples)
        w, packed = weights(base, change), chosen.pack(base, change)

        def block(tower: str) -> Weights:
            """The new block's weights, which are packed behind the last layer's number."""
            return lambda path: packed[f"{tower}:deep.{LAYERS - 1}.{path}"].detach().double()

        x = picture_tokens(pixels_of(examples), w)
        for n in range(LAYERS):
            x = vit_block(x, w, f"image.layers.{n}")
        below = layer_norm(x, w, "image.layernorm")
        x = vit_block(x, lambda path: block("image")(path.removeprefix("new.")), "new")
        assert close(seen, layer_norm(x, w, "image.layernorm"))
        assert not close(seen, below, 0.1)
        ids, mask = tokens_of(examples)
        h = language(ids, mask, w)
        assert not close(read, h, 0.1)
        h = bert_layer(h, mask, lambda path: block("text")(path.removeprefix("new.")), "new")
        assert close(read, h)


def test_deep_adapter_is_a_deeper_tower_of_transformers() -> None:
    """The same numbers as a model of one more layer that is given the same weights."""
    base, examples = towers(), pairs(range(5))
    deeper = {"num_hidden_layers": LAYERS + 1}
    models = {"image": tiny_tower("vit", **deeper), "text": tiny_tower("bert", **deeper)}
    stacks = {"image": "layers", "text": "encoder.layer"}
    chosen = both(DEEP)
    with attached(chosen, base) as change:
        stir(change)
        found = states(base, examples)
        packed, w = chosen.pack(base, change), weights(base, change)
        for tower, model in models.items():
            for name, value in model.named_parameters():
                new = name.removeprefix(f"{stacks[tower]}.{LAYERS}.")
                if not name.startswith("pooler"):
                    given = packed[f"{tower}:deep.{LAYERS - 1}.{new}"] if new != name else None
                    value.data.copy_(w(f"{tower}.{name}") if given is None else given)
    ids, mask = tokens_of(examples)
    with torch.no_grad():
        seen = models["image"].eval()(pixel_values=pixels_of(examples).float()).last_hidden_state
        read = models["text"].eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    assert close(found[0], seen.double())
    assert close(found[1], read.double())


def test_deep_adapter_trains_its_block_and_the_norms() -> None:
    """All of a full-size block, drawn with σ = 0.02; beneath it LayerNorms alone."""
    base = towers()
    with attached(both(DEEP), base) as change:
        new = {path: value for path, value in change.trainable.items() if ":" in path}
        old = {path for path in change.trainable if ":" not in path}
        assert old == set(base.choose(("norm",)))
        d, inner = HIDDEN, 2 * HIDDEN
        each = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
        assert sum(value.numel() for value in new.values()) == 2 * each
        matrices = torch.cat([v.detach().flatten() for v in new.values() if v.ndim == 2])
        assert float(matrices.std()) == pytest.approx(0.02, rel=0.05)
        for path, value in new.items():
            if value.ndim == 1:
                scale = "norm" in path.lower() and path.endswith("weight")
                assert torch.equal(value.detach(), torch.full_like(value, float(scale)))


# --- (e) what a step moves ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", [layerwise(), DEEP], ids=["LwA", "DA"])
def test_a_step_moves_what_trains_and_nothing_else(settings: Settings) -> None:
    """AdamW as the paper has it, decay among it, in training mode."""
    base, examples = towers(), pairs(range(8))
    pretrained = {name: v.detach().clone() for name, v in base.towers.named_parameters()}
    norms = set(base.choose(("norm",)))
    change = attached(both(settings), base)
    model = wired(base).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(trained) == len(change.trainable) + 5
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02)
    run(model, base, examples)["loss"].backward()
    optimiser.step()
    after = dict(model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name, value in after.items() if value.requires_grad}
    # Softmax takes no notice of the same number on all of its scores.
    keys = {name for name in expected if name.endswith(("k_proj.bias", "self.key.bias"))}
    assert expected - keys <= moved <= expected
    assert {n for n in moved if n.startswith("head.")} == {
        "head.temperature",
        *(f"head.{t}_projection.{n}" for t in ("image", "text") for n in ("weight", "bias")),
    }
    for path, value in pretrained.items():
        now = after.get(f"towers.{path}")
        assert now is not None
        assert torch.equal(now.detach(), value) == (path not in norms)
    assert moved - {f"towers.{path}" for path in norms} - {n for n in moved if "head." in n}
    change.remove()
    left = dict(base.towers.named_parameters())
    assert left.keys() == pretrained.keys()
    assert all(torch.equal(left[path], value) for path, value in pretrained.items())
    assert base.is_untouched()


def test_nothing_of_a_locked_tower_moves() -> None:
    """LiT: the image tower locked, the text tower and the projections trained."""
    base, examples = towers(), pairs(range(8))
    before = {name: value.detach().clone() for name, value in base.towers.named_parameters()}
    with attached(method("towers", image={}, text=select("all")), base) as change:
        assert all(path.startswith("text.") for path in change.trainable)
        model = wired(base).train()
        rest = [value for value in model.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(rest, lr=1e-2)
        run(model, base, examples)["loss"].backward()
        optimiser.step()
        for path, value in base.towers.named_parameters():
            assert torch.equal(value.detach(), before[path]) == path.startswith("image.")


# --- (f) whose negatives -----------------------------------------------------------------------

# Pictures 2 and 5 are on both sides.
SHARED = [0, 1, 2, 5, 2, 3, 4, 5]
KINDS: dict[str, dict[str, Any]] = {
    "local": {},
    "gathered": {"negatives": "gathered"},
    "gathered-chunks": {"negatives": "gathered", "chunk": 3},
}


def aligned(dropout: bool = False, **settings: Any) -> tuple[TwoTowers, Change, Wired]:
    """Adapters and LayerNorms, moved, on a tiny pair, and a readout, in training mode."""
    silent: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = towers(**({} if dropout else silent))
    change = attached(both(layerwise()), base)
    stir(change, 0.1)
    return base, change, wired(base, **settings).train()


def half_of_the_work(rank: int, folder: str) -> None:
    """One of two processes with half of the pairs; gradients are averaged, as by torch's DDP."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        found = {}
        for kind, settings in KINDS.items():
            base, change, model = aligned(**settings)
            loss, gradients = backward(model, base, change, pairs(SHARED)[rank * 4 :][:4])
            held = {"loss": torch.tensor(loss), **gradients}
            for value in held.values():
                torch.distributed.all_reduce(value)
            found[kind] = {name: value / 2 for name, value in held.items()}
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients, averaged over two processes, for each of `KINDS`."""
    folder = tmp_path_factory.mktemp("gloo")
    start_processes(half_of_the_work, (str(folder),), nprocs=2, start_method="spawn")
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "found.pt")
    return found


def test_losses_of_two_halves_are_not_that_of_the_whole() -> None:
    """Each softmax has the columns of its own shard."""
    base, _, model = aligned()
    examples = pairs(range(8))
    with torch.no_grad():
        whole = run(model, base, examples)
        halves = [loss_now(model, base, part) for part in (examples[:4], examples[4:])]
    v, t = whole["logits"].double().split(WIDTH, 1)
    expected = [
        info_nce((v[rows] * 0.07**0.5).tolist(), (t[rows] * 0.07**0.5).tolist(), 0.07)
        for rows in (slice(0, 4), slice(4, 8), slice(0, 8))
    ]
    assert [*halves, float(whole["loss"])] == pytest.approx(expected, rel=1e-4)
    assert sum(halves) / 2 < float(whole["loss"]) - 0.1


@pytest.mark.slow
def test_local_negatives_on_two_processes(of_two_processes: dict[str, dict[str, Tensor]]) -> None:
    """The mean of the halves, in loss and in gradients, and not the whole."""
    base, change, model = aligned()
    examples = pairs(SHARED)
    parts = [backward(model, base, change, part) for part in (examples[:4], examples[4:])]
    found = dict(of_two_processes["local"])
    loss = float(found.pop("loss"))
    assert loss == pytest.approx((parts[0][0] + parts[1][0]) / 2, abs=1e-5)
    mean = {name: (value + parts[1][1][name]) / 2 for name, value in parts[0][1].items()}
    assert_equal_gradients(found, mean)
    assert loss < backward(model, base, change, examples)[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gathered", "gathered-chunks"])
def test_gathered_negatives_on_two_processes_are_those_of_one(
    kind: str, of_two_processes: dict[str, dict[str, Tensor]]
) -> None:
    base, change, model = aligned()
    loss, gradients = backward(model, base, change, pairs(SHARED))
    found = dict(of_two_processes[kind])
    assert float(found.pop("loss")) == pytest.approx(loss, abs=1e-5)
    assert_equal_gradients(found, gradients)


def test_gathered_negatives_of_one_process_are_local() -> None:
    base, change, model = aligned()
    loss, gradients = backward(model, base, change, pairs(SHARED))
    change.remove()
    base, change, model = aligned(negatives="gathered")
    found, own = backward(model, base, change, pairs(SHARED))
    assert found == pytest.approx(loss, abs=1e-6)
    assert_equal_gradients(own, gradients, 1e-6)


# --- (g) chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 4, 8, 100])
def test_chunks_change_nothing_without_dropout(chunk: int) -> None:
    """Nor do captions of different lengths, and pictures that come twice."""
    base, change, model = aligned()
    loss, gradients = backward(model, base, change, pairs(SHARED))
    base, change, model = aligned(chunk=chunk)
    found, own = backward(model, base, change, pairs(SHARED))
    assert found == pytest.approx(loss, abs=1e-5)
    assert_equal_gradients(own, gradients)
    model.eval()
    with torch.no_grad():
        assert loss_now(model, base, pairs(SHARED)) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_towers_see_a_chunk_at_a_time(chunk: int) -> None:
    """What the other tests of chunks would say nothing without."""
    base, change, model = aligned(chunk=chunk)
    sizes: dict[str, list[int]] = {name: [] for name in base.parts}
    for name, part in base.parts.items():
        part.tower.register_forward_hook(
            lambda *called, name=name: sizes[name].append(len(called[-1].last_hidden_state))
        )
    backward(model, base, change, pairs(range(8)))
    for found in sizes.values():
        assert max(found) == chunk
        assert sum(found) in (8, 16)  # once, or again for the gradient


@pytest.mark.parametrize("training", [False, True])
def test_loss_of_a_chunked_batch_in_loops(training: bool) -> None:
    base, _, model = aligned(chunk=3)
    model.train(training)
    found = run(model, base, pairs(range(8)))
    v, t = (found["logits"].detach().double() * 0.07**0.5).split(WIDTH, 1)
    expected = info_nce(v.tolist(), t.tolist(), 0.07)
    assert float(found["loss"].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [0, 1, 3, 8, 100])
def test_chunks_with_dropout_are_those_of_one_graph(chunk: int) -> None:
    """Against text encoded part by part in a single graph, from the same seed.

    Only the text tower draws numbers. A chunk that is encoded again for its gradient must draw
    those of the first time: the gradient would be that of another loss otherwise.
    """
    base, change, model = aligned(dropout=True, chunk=chunk)
    examples = pairs(range(8), length=6)
    ids, mask = tokens_of(examples)
    model.zero_grad(set_to_none=True)
    seen = base.parts["image"].tower(pixel_values=pixels_of(examples).float())
    torch.manual_seed(5)
    step = chunk or 8
    read = [
        base.parts["text"].tower(input_ids=ids[at : at + step], attention_mask=mask[at : at + step])
        for at in range(0, 8, step)
    ]
    text = torch.cat([part.last_hidden_state[:, 0] for part in read])
    head = head_of(model)
    v = nn.functional.normalize(head.image_projection(seen.last_hidden_state[:, 0]), dim=-1)
    t = nn.functional.normalize(head.text_projection(text), dim=-1)
    scores = v @ t.T / head.temperature
    own = scores.diag()
    loss = ((scores.logsumexp(1) - own).mean() + (scores.logsumexp(0) - own).mean()) / 2
    loss.backward()
    expected = named_gradients(model, change)
    torch.manual_seed(5)
    found, gradients = backward(model, base, change, examples)
    assert found == pytest.approx(float(loss.detach()), abs=1e-5)
    assert_equal_gradients(gradients, expected)
    model.eval()
    assert abs(backward(model, base, change, examples)[0] - found) > 1e-3


@pytest.mark.parametrize("chunk", [0, 3])
def test_chunks_with_dropout_have_the_gradient_of_their_loss(chunk: int) -> None:
    """The difference of losses along the gradient, from one seed, is the gradient's square.

    Of captions of any length and pictures that come twice, whatever order numbers are drawn in.
    """
    base, change, model = aligned(dropout=True, chunk=chunk)
    examples = pairs(SHARED)
    torch.manual_seed(6)
    first, gradients = backward(model, base, change, examples)
    torch.manual_seed(6)
    again, repeated = backward(model, base, change, examples)
    assert again == first
    assert all(torch.equal(gradients[name], repeated[name]) for name in gradients)
    every = {**change.trainable, **{f"head.{n}": p for n, p in head_of(model).named_parameters()}}
    every.pop("head.temperature")  # so steep that it would be all that counts
    square = sum(float(gradients[name].double().square().sum()) for name in every)
    step = 1e-3 / math.sqrt(square)
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, value in every.items():
                value.add_(sign * step * gradients[name])
        torch.manual_seed(6)  # with gradients on: without, there need not be chunks
        losses.append(loss_now(model, base, examples))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square, rel=1e-2)
