"""What a caller asks of a table: its columns or its form, and which part of it is which split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from howfine.errors import SettingError
from howfine.tasks import SPLITS, forms


@dataclass(frozen=True)
class Wanted:
    """Columns, splits and the seed."""

    # One column, or two for pairs.
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    # Split -> its name in the source, for those the caller named.
    splits: Mapping[str, str] | None = None
    # Salts the hash that makes missing splits.
    seed: int = 0
    # Column of texts to be written, "" for a task of classes or scores.
    target: str = ""
    # A name in forms.FORMS, which then says the columns; "" for none.
    form: str = ""
    # Column of pictures, of which `text` then has the captions; "" for a task without.
    image: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold texts where a file knows texts alone."""
        return (
            forms.known(self.form).names
            if self.form
            else (*self.text, self.label, self.target, self.image)
        )


def wanted(given: Mapping[str, Any], seed: int) -> Wanted:
    """What the options of `Task.load` ask for. Raises SettingError for those that don't fit."""
    splits = {split: given[split] for split in SPLITS if split in given}
    if form := given.get("form", ""):
        forms.known(form)
        if named := [
            f"{key}={given[key]!r}" for key in ("text", "label", "target", "image") if key in given
        ]:
            raise SettingError(
                f"form={form!r} names its columns itself, but found {', '.join(named)}; leave one "
                "or the other out"
            )
        return Wanted(splits=splits, seed=seed, form=form)
    text = given.get("text", "text")
    names = text.split(",") if isinstance(text, str) else text
    names = tuple(name.strip() for name in names)
    if len(names) not in (1, 2) or "" in names:
        raise SettingError(f"text={text!r}, expected one column or two, such as premise,hypothesis")
    if "image" in given and (odd := [key for key in ("label", "target") if key in given]):
        raise SettingError(
            f"image={given['image']!r} and {odd[0]}={given[odd[0]]!r}: a picture's text is its "
            "caption, and nothing else is learned of it; leave one out"
        )
    if "label" in given and "target" in given:
        raise SettingError(
            f"label={given['label']!r} and target={given['target']!r}: a task has classes, scores "
            "or texts to be written; name one column"
        )
    if "image" in given and len(names) > 1:
        raise SettingError(
            f"text={text!r} names two columns beside pictures; expected the one of their captions, "
            "whose cells may be lists"
        )
    label, target, image = (given.get(key, "") for key in ("label", "target", "image"))
    return Wanted(names, label or "label", splits, seed, target, image=image)
