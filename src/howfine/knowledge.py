"""What a tower knew before it was aligned, and how much of it a change keeps.

Khan & Fu 2023 ask whether alignment costs a tower its own knowledge. Two answers, both of the
tower's pooled states and not of what the readout's projections make of them: how far the states
turned, and what a linear classifier can still read off them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from howfine.base import IMAGE, TEXT, Base
from howfine.delta import Delta
from howfine.directions import Encoder, encoder
from howfine.errors import SettingError
from howfine.images import Picture
from howfine.readout import Wired, readouts

States = npt.NDArray[np.float32]


def drift(
    delta: Delta | str | Path,
    base: Base,
    *,
    pictures: Sequence[Picture] = (),
    texts: Sequence[str] = (),
) -> dict[str, float]:
    """Mean cosine of each tower's states before and after, of the pictures and texts given.

    1.0 for a tower that the delta does not change: both take pictures and texts as the delta's
    readout does. Raises as `howfine.directions.encoder`.
    """
    delta, found = _loaded(delta), {}
    for tower, items in ((IMAGE, pictures), (TEXT, texts)):
        if items:
            before, after = (states(each, base, items, like=delta) for each in (None, delta))
            both = (before * after).sum(axis=1)
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            found[tower] = float((both / norms).mean())
    return found


def linear_probe(
    delta: Delta | str | Path | None,
    base: Base,
    train: tuple[Sequence[Any], Sequence[int]],
    test: tuple[Sequence[Any], Sequence[int]],
    seed: int = 0,
    *,
    like: Delta | str | Path | None = None,
) -> float:
    """Accuracy on `test` of a logistic regression on a tower's states of `train`.

    Both are (pictures or texts, class numbers); without a delta the tower is as it was pretrained,
    and takes them as the readout of the delta `like` does, to be compared with that one.
    Raises SettingError for items and classes of unequal counts.
    """
    for items, classes in (train, test):
        if len(items) != len(classes) or not len(items):
            raise SettingError(
                f"linear probe: found {len(items)} items and {len(classes)} classes, expected as "
                "many of each, and some"
            )
    learned, shown = (states(delta, base, items, like=like) for items, _ in (train, test))
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    reader.fit(learned, np.asarray(train[1]))
    return float(reader.score(shown, np.asarray(test[1])))


def states(
    delta: Delta | str | Path | None,
    base: Base,
    items: Sequence[Any],
    *,
    like: Delta | str | Path | None = None,
) -> States:
    """(n, d) pooled states of pictures by the image tower, or of texts by the text tower.

    A delta takes them as its readout says. Without one, as that of the delta `like`; without that,
    pictures in the size that the tower's folder states.
    """
    of_pictures = isinstance(items[0], Picture)
    marks = [item.digest if of_pictures else item for item in items]
    different = list(dict(zip(marks, items, strict=True)).values())  # each is encoded once
    found: list[States] = []
    with _encoder(delta, base, like) as encode:
        head: Any = encode.model.head
        projection = head.image_projection if of_pictures else head.text_projection
        hook = projection.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].float().cpu().numpy())
        )
        try:
            (encode.pictures if of_pictures else encode.texts)(different)
        finally:
            hook.remove()
    numbers = {mark: number for number, mark in enumerate(dict.fromkeys(marks))}
    made: States = np.concatenate(found)[[numbers[mark] for mark in marks]]
    return made


@contextmanager
def _encoder(
    delta: Delta | str | Path | None, base: Base, like: Delta | str | Path | None
) -> Iterator[Encoder]:
    if delta is not None:
        with encoder(delta, base) as made:
            yield made
        return
    # Whatever aligns runs both towers; what it makes of their states is not looked at.
    default = next(cls for cls in readouts().values() if cls.aligns)
    readout = default() if like is None else _loaded(like).readout
    yield Encoder(Wired(base, readout, readout.attach(base, ())).eval(), base, 64, False)


def _loaded(delta: Delta | str | Path) -> Delta:
    return delta if isinstance(delta, Delta) else Delta.load(delta)
