"""Two towers, aligned: pictures and captions that belong together get like directions.

Khan & Fu 2023, "Contrastive alignment of vision to language through parameter-efficient transfer
learning" (LilT), after Radford et al. 2021: v = P_V h_V + b_V and t = P_T h_T + b_T, each of length
1, and the symmetric cross-entropy of S = <v_i, t_j> / τ over a batch's pairs. τ is learned, from
0.07 on, within 0.001 and 0.5.

Another caption of the same picture is no negative here: in the paper's 118,000 pictures a batch
hardly has two of one. Each tower is pooled as its own folder states; of a text tower with a pooler
the first position is read, as in the paper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from howfine import images, retrieval
from howfine.base import IMAGE, TEXT, Base, TwoTowers
from howfine.batch import Batch
from howfine.encoding import encoded
from howfine.errors import SettingError
from howfine.metrics import Metric
from howfine.pooling import pool, reading
from howfine.processes import gathered
from howfine.readout import Head, Labels, Readout
from howfine.task import Example

TEMPERATURE, COLDEST, HOTTEST = 0.07, 0.001, 0.5
# ImageNet's, for a folder that states no other.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of torchvision's RandomResizedCrop: shares of the area, and ratios of the sides.
_AREA, _RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Contrastive(Readout):
    """How wide the shared space is, what is read, and against what each pair is held."""

    kind: ClassVar[str] = "two_towers"
    aligns: ClassVar[bool] = True

    # Numbers of a direction.
    width: int = 256
    # Pixels of a picture's side; 0 for as many as the image tower's own preparation has.
    size: int = 0
    # Tokens kept of a caption, special tokens counted.
    max_length: int = 25
    # A batch's other pairs of this process, as in the paper's code, or of all processes.
    negatives: Literal["local", "gathered"] = "local"
    # Pairs encoded at a time in training, the rest's activations computed again in the backward
    # pass, so that large batches fit (Gao et al. 2021, GradCache); 0 for all at once.
    chunk: int = 0
    # Cut pictures at random and mirror half of them in training.
    augment: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.size < 0 or self.max_length < 1 or self.chunk < 0:
            raise SettingError(
                f"contrastive: found width {self.width}, size {self.size}, max_length "
                f"{self.max_length} and chunk {self.chunk}, expected at least 1, 0, 1 and 0"
            )

    @property
    def adds_up(self) -> bool:
        return False  # a pair is held against those of its own batch

    def settled(self, base: Base, labels: Labels = ()) -> Contrastive:
        """With the size of pictures that this base states."""
        return replace(self, size=self.size or _stated_size(_towers(base).parts[IMAGE]))

    def attach(self, base: Base, labels: Labels) -> Head:
        towers = _towers(base)
        size, patch = self.settled(base).size, _patch(towers.parts[IMAGE])
        if size < patch:
            raise SettingError(
                f"contrastive size: found {size} pixels, and a patch of {base.name} has {patch} on "
                "a side; give as many at least, or 0 for what the image tower states"
            )
        return Aligned(towers, self)

    def collate(self, base: Base, examples: Sequence[Example], labelled: bool = True) -> Batch:
        """`pictures` (B,) says which of the `pixel_values` (U, 3, H, W) a row is about.

        Examples without a picture, and those without a text, have none of that part's inputs.
        """
        parts, size = _towers(base).parts, self.settled(base).size
        inputs: dict[str, Tensor] = {}
        shown = [example.picture for example in examples if example.picture]
        if shown:
            different = list({picture.digest: picture for picture in shown}.values())
            numbers = {picture.digest: number for number, picture in enumerate(different)}
            inputs["pixel_values"] = normalised(parts[IMAGE], images.pixels(different, size))
            inputs["pictures"] = torch.tensor([numbers[picture.digest] for picture in shown])
        if texts := [example.texts[0] for example in examples if example.texts]:
            inputs |= encoded(parts[TEXT], [texts], self.max_length)
        targets = torch.tensor([picture.digest for picture in shown]) if labelled else None
        return Batch(inputs=inputs, targets=targets)

    def pack(self, head: Head) -> dict[str, Tensor]:
        tensors = super().pack(head)
        tensors["temperature"].clamp_(COLDEST, HOTTEST)  # the last step may have left them
        return tensors

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(outputs.device.type, enabled=False):  # at 0.001 each digit counts
            return self._loss(outputs.float(), targets)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        image, text = outputs.chunk(2, dim=-1)
        images_, texts, owners, first = image, text, targets, 0
        if self.negatives == "gathered":
            (images_, texts, owners), first = gathered(image, text, targets)
        own = torch.arange(first, first + len(image), device=image.device)
        other = functional.one_hot(own, len(owners)) == 0
        twin = other & (targets[:, None] == owners)
        losses = [
            functional.cross_entropy((a @ b.T).masked_fill(twin, -torch.inf), own)
            for a, b in ((image, texts), (text, images_))
        ]
        return (losses[0] + losses[1]) / 2

    def predict(self, outputs: Tensor) -> Tensor:
        """(B, 2·width): directions have no answers; they are compared, as `retrieval` does."""
        return outputs

    def predictions(self, base: Base, outputs: Tensor) -> np.ndarray:
        return retrieval.as_objects(outputs.float().numpy())

    def progress(self, outputs: Tensor, targets: np.ndarray, metric: Metric) -> float:
        return float(metric.function(retrieval.as_objects(outputs.float().numpy()), targets))

    def told(self, base: Base, labels: Labels, outputs: Tensor) -> list[dict[str, Any]]:
        raise SettingError(
            "this delta aligns pictures with texts and answers no question about one of them; look "
            "for pictures with `howfine search`, or compare with howfine.encoder"
        )


def _towers(base: Base) -> TwoTowers:
    if not isinstance(base, TwoTowers):
        raise SettingError(
            f"pictures and captions are aligned by two towers, and the base {base.name} has one; "
            "give an image and a text encoder, with a plus in between their names"
        )
    return base


def _stated_size(image: Base) -> int:
    """Pixels of a side: of the folder's crop or resizing, else of the config."""
    for key in ("crop_size", "size"):
        stated = image.preprocessing.get(key) or {}
        stated = stated if isinstance(stated, dict) else {"height": stated}
        for side in ("height", "shortest_edge"):
            if side in stated:
                return int(stated[side])
    return int(image.config.image_size)


def _patch(image: Base) -> int:
    """Pixels of a patch's longer side; 1 for a tower that knows no patches."""
    stated = getattr(image.config, "patch_size", None) or 1
    return max(stated) if isinstance(stated, list | tuple) else int(stated)


def normalised(image: Base, values: images.Pixels) -> Tensor:
    """(n, 3, H, W) pictures from 0 to 255 as the image tower takes them."""
    stated = image.preprocessing
    both = stated.get("image_mean") or _MEAN, stated.get("image_std") or _STD
    if stated.get("do_normalize") is False:
        both = (0.0,), (1.0,)
    scale = float(stated.get("rescale_factor") or 1 / 255)
    mean, std = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in both)
    return (torch.from_numpy(values).float() * scale - mean) / std


class Aligned(Head):
    """The two projections and the temperature. Its outputs (B, 2·width) are v and t over √τ.

    So the dot product of a row's v with another's t is S, whatever τ is.
    """

    def __init__(self, base: TwoTowers, settings: Contrastive) -> None:
        super().__init__()
        image, text = base.parts[IMAGE], base.parts[TEXT]
        self.settings = settings
        self.paths = {name: part.body_path for name, part in base.parts.items()}
        self.pooling = {name: part.pooling for name, part in base.parts.items()}
        if self.pooling[TEXT] == "pooler":  # of BERT's next sentences: the paper takes none
            self.pooling[TEXT] = "cls"
        known = inspect.signature(image.tower.forward).parameters
        # Of ViT and CLIP, whose table of positions is for pictures of one size.
        self.resizes = "interpolate_pos_encoding" in known
        self.image_projection = nn.Linear(image.hidden_size, settings.width)
        self.text_projection = nn.Linear(text.hidden_size, settings.width)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))

    def forward(self, towers: nn.ModuleDict, batch: Batch) -> Tensor:
        inputs = batch.inputs
        with torch.no_grad():  # in place, as the paper's: a bound outside the graph
            self.temperature.clamp_(COLDEST, HOTTEST)
        own = []
        if "pixel_values" in inputs:
            own.append(self.images(towers, inputs["pixel_values"])[inputs["pictures"]])
        if "input_ids" in inputs:
            text = {name: inputs[name] for name in inputs if name not in _OF_IMAGES}
            own.append(self.texts(towers, text))
        return torch.cat(own, dim=-1) * self.temperature.rsqrt()

    def images(self, towers: nn.ModuleDict, pixels: Tensor) -> Tensor:
        """(U, width) directions of length 1, of (U, 3, H, W) pictures."""
        if self.training and self.settings.augment:
            pixels = cut(pixels)
        tower, options = towers.get_submodule(self.paths[IMAGE]), {}
        if self.resizes:
            options["interpolate_pos_encoding"] = True

        def encode(pixel_values: Tensor) -> Tensor:
            pixel_values = pixel_values.to(next(tower.parameters()).dtype)
            with reading(self.pooling[IMAGE]):
                state = tower(pixel_values=pixel_values, **options)
            return pool(state, None, self.pooling[IMAGE])

        return self._direction(self.image_projection, self._in_chunks(encode, pixels))

    def texts(self, towers: nn.ModuleDict, inputs: dict[str, Tensor]) -> Tensor:
        """(B, width) directions of length 1, of tokens (B, S)."""
        tower, names = towers.get_submodule(self.paths[TEXT]), tuple(inputs)

        def encode(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            with reading(self.pooling[TEXT]):
                state = tower(**given)
            return pool(state, given.get("attention_mask"), self.pooling[TEXT])

        return self._direction(self.text_projection, self._in_chunks(encode, *inputs.values()))

    def _direction(self, projection: nn.Linear, pooled: Tensor) -> Tensor:
        return functional.normalize(projection(pooled.to(projection.weight.dtype)), dim=-1)

    def _in_chunks(self, encode: Callable[..., Tensor], *values: Tensor) -> Tensor:
        size = self.settings.chunk
        if not (size and self.training and torch.is_grad_enabled()):
            return encode(*values)
        parts = zip(*(value.split(size) for value in values), strict=True)
        return torch.cat([checkpoint(encode, *part, use_reentrant=False) for part in parts])


_OF_IMAGES = ("pixel_values", "pictures")


def cut(pixels: Tensor) -> Tensor:
    """A part of each of (n, 3, H, W) pictures, as large as the whole one; half of them mirrored.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, of pictures already resized.
    """
    count, device = len(pixels), pixels.device
    area = torch.empty(count, device=device).uniform_(*_AREA)
    low, high = (torch.tensor(ratio).log().item() for ratio in _RATIO)
    ratio = torch.empty(count, device=device).uniform_(low, high).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)
    centre = (2 * torch.rand(count, 2, device=device) - 1) * (1 - sides)
    mirror = torch.randint(0, 2, (count,), device=device) * 2.0 - 1
    moved = torch.zeros(count, 2, 3, device=device)
    moved[:, 0, 0], moved[:, 1, 1] = sides[:, 0] * mirror, sides[:, 1]
    moved[:, :, 2] = centre
    grid = functional.affine_grid(moved, list(pixels.shape), align_corners=False)
    return functional.grid_sample(
        pixels, grid.to(pixels.dtype), "bicubic", "reflection", align_corners=False
    )


EXAMPLE = Contrastive(width=16, size=8, max_length=16)
