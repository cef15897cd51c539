"""Forms of tables of one's own whose rows are made of segments; a new form is a row of FORMS.

A form says which columns there are, what each holds, and which segments they make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from howfine.errors import MissingColumn, SettingError, near
from howfine.tasks import Row, bad_row
from howfine.tasks.dialogue import asked, talk
from howfine.tasks.segments import AFTER, BETWEEN, RESPONSE, SOURCE, TARGET, Segments, rendered
from howfine.tasks.written import targets_of


class Holds(NamedTuple):
    """What a column holds."""

    # In words, for messages.
    expected: str
    # What of a cell is read, None where the cell holds something else.
    read: Callable[[Any], Any]
    # A column that may be left out, or hold nothing in some rows.
    optional: bool = False


@dataclass(frozen=True)
class Form:
    """The columns of a table, and the segments they make."""

    columns: Mapping[str, Holds]
    # The column of what is to be written: a text, or a list of texts.
    target: str
    # Takes what the columns hold, in their order; None for what is left out.
    made: Callable[..., Segments]
    # By which what is written is customarily scored; None for the metric of all texts.
    metric: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All its columns."""
        return (*self.columns, self.target)


def _text(cell: Any) -> str | None:
    return cell if isinstance(cell, str) and cell.strip() else None


def _texts(cell: Any) -> list[str] | None:
    found = list(cell) if isinstance(cell, list | tuple) else []
    return found if found and all(map(_text, found)) else None


def _rounds(cell: Any) -> list[str] | None:
    found = [] if cell in ([], ()) else _texts(cell)
    return found if found is not None and len(found) % 2 == 0 else None


def _pairs(cell: Any) -> list[tuple[str, str]] | None:
    """Names and texts; what an object has no text for (null) is left out."""
    if isinstance(cell, dict):
        cell = [[name, text] for name, text in cell.items() if text is not None]
    if not isinstance(cell, list) or not cell:
        return None
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in cell):
        return None
    whole = all(_text(part) for pair in cell for part in pair)
    # Such a name could not be told from the text around it.
    if not whole or any(mark in name for name, _ in cell for mark in (BETWEEN, AFTER)):
        return None
    return [(name, text) for name, text in cell]


TEXT = Holds("a text that is not empty", _text)
TURNS = Holds("a list of texts, none of them empty", _texts)
SENTENCES = TURNS._replace(optional=True)
ROUNDS = Holds("a list of questions and answers in turn, none of them empty", _rounds, True)
TABLE = Holds(
    "an object of names and texts (from JSON or Parquet: a CSV file holds text alone; numbers as "
    "text), or a list of [name, text], with none of them empty and no name with "
    f"{BETWEEN!r} or {AFTER!r}",
    _pairs,
)


def _tabled(pairs: Sequence[tuple[str, str]]) -> Segments:
    return (*pairs, (RESPONSE, ""))


def translated(source: str) -> Segments:
    """A text that stands for itself, and another to be written for it."""
    return ((SOURCE, source), (TARGET, ""))


FORMS = {
    "table": Form({"table": TABLE}, "response", _tabled),
    "translation": Form({"source": TEXT}, "target", translated),
    "summary": Form({"source": TEXT}, "target", translated, "rouge_l"),
    "dialogue": Form({"persona": SENTENCES, "history": TURNS}, "reply", talk),
    "qa": Form(
        *({"document": TEXT, "history": ROUNDS, "question": TEXT}, "answer", asked), "token_f1"
    ),
}


def known(name: str) -> Form:
    """A form by name. Raises SettingError with the near one."""
    if name not in FORMS:
        raise SettingError(f"form {name!r} is unknown. {near(name, FORMS)}")
    return FORMS[name]


def rows_of(columns: Mapping[str, Sequence[Any]], name: str, source: str) -> list[Row]:
    """Rows of a table that has a form's columns.

    Raises MissingColumn, or TaskError naming the first bad row.
    """
    form = known(name)
    for column in form.names:
        if column not in columns and not (column in form.columns and form.columns[column].optional):
            raise MissingColumn(
                f"{source} has no column {column!r}; found {', '.join(columns) or 'none'}, and "
                f"the form {name} has {', '.join(form.names)}. Rename the column"
            )
    rows = []
    for number, target in enumerate(columns[form.target], 1):
        row = Row((), 0, source, number)
        read = []
        for column, holds in form.columns.items():
            cell = columns[column][number - 1] if column in columns else None
            left_out = holds.optional and not cell
            read.append(None if left_out else holds.read(cell))
            if read[-1] is None and not left_out:
                raise bad_row(row, column, cell, holds.expected)
        segments = form.made(*read)
        targets = targets_of(row, form.target, target)
        rows.append(row._replace(texts=(rendered(segments),), targets=targets, segments=segments))
    return rows
