"""Examples from files and from data sets of the hub: which part is which split, and its rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from howfine.errors import BadSplit, SettingError, TaskNotFound, near
from howfine.tasks import (
    ALIASES,
    SPLITS,
    Found,
    Row,
    captions,
    completed,
    forms,
    rows_of,
    written,
)
from howfine.tasks.tables import READERS, Columns, columns, read_numbers
from howfine.tasks.wanted import Wanted


def read(path: Path, wanted: Wanted) -> Found:
    """A folder with a file for each split, or one file, which is train.

    Splits that are missing are made by a hash of the text. Raises TaskNotFound, BadSplit,
    MissingColumn, or TaskError for a file or a row that can't be read.
    """
    paths = _in_folder(path, wanted) if path.is_dir() else _beside(path, wanted)
    _apart(paths)
    tables = {split: columns(file, wanted) for split, file in paths.items()}
    read_numbers(
        [t for split, t in tables.items() if paths[split].suffix in (".csv", ".tsv")], wanted.label
    )
    sources = {split: str(file) for split, file in paths.items()}
    return _found(tables, sources, wanted, labels=None, origin=str(path))


def named(name: str, data: Path | None) -> Path:
    """The folder of data that a task by name is read from. Raises TaskNotFound for none."""
    if data is None:
        raise TaskNotFound(
            f"task {name!r} is read from a folder of Parquet files; name it with --data, or with "
            "the environment variable HOWFINE_DATA"
        )
    return data


def read_hub(name: str, wanted: Wanted) -> Found:
    """A data set of the hub, "owner/name" or "owner/name:config".

    Raises TaskNotFound where it can't be had, and what `read` raises for its content.
    """
    owner_name, _, config = name.partition(":")
    splits = hub_splits(owner_name, config or None)
    chosen = _chosen(splits, wanted, name)
    sources = {split: f"{name} {theirs}" for split, theirs in chosen.items()}
    tables = {split: splits[theirs].to_dict() for split, theirs in chosen.items()}
    feature = splits[chosen["train"]].features.get(wanted.label)
    labels = _class_names(feature)
    return _found(tables, sources, wanted, labels=labels, origin=f"{name} from the hub")


def hub_splits(name: str, config: str | None, revision: str | None = None) -> Mapping[str, Any]:
    """The splits of a data set of the hub, from the local cache where it is there.

    Of a branch, `revision`, the configuration is a folder. Raises TaskNotFound, with the reason,
    for an unknown name or without a network.
    """
    import datasets  # seconds to import, and only the hub needs it

    found: Mapping[str, Any]
    try:
        if revision is None:
            found = datasets.load_dataset(name, config)
        else:
            found = datasets.load_dataset(name, data_dir=config, revision=revision)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: it is made by a program
        label = f"{name}:{config}" if config else name
        raise TaskNotFound(
            f"data set {label!r} can't be had from the hub: {str(error).splitlines()[0]}. "
            "Give a file or a folder instead, or for a GLUE task a folder of data with --data"
        ) from error
    return found


def _class_names(feature: Any) -> tuple[str, ...] | None:
    from datasets import ClassLabel

    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _found(
    tables: Mapping[str, Columns],
    sources: Mapping[str, str],
    wanted: Wanted,
    *,
    labels: tuple[str, ...] | None,
    origin: str,
) -> Found:
    made = [split for split in SPLITS if split not in tables]
    how = (
        f"; {' and '.join(made)} carved out of train by a hash of the text, seed {wanted.seed}"
        if made
        else "; its own splits"
    )
    if wanted.image:
        named = wanted.image, wanted.text[0]
        return captions.found(tables, sources, named, origin, how, wanted.seed)
    rows = {split: _rows(table, wanted, sources[split]) for split, table in tables.items()}
    whole = completed(rows, wanted.seed)
    if wanted.target or wanted.form:
        whole = written.referenced(whole)
    metric = forms.known(wanted.form).metric if wanted.form else None
    return Found(whole, labels, metric, provenance=f"{origin}{how}")


def _rows(table: Columns, wanted: Wanted, source: str) -> list[Row]:
    if wanted.form:
        return forms.rows_of(table, wanted.form, source)
    if wanted.target:
        return written.rows_of(table, wanted.text, wanted.target, source)
    return rows_of(table, wanted.text, wanted.label, source)


def _in_folder(folder: Path, wanted: Wanted) -> dict[str, Path]:
    paths: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in READERS:
            paths.setdefault(path.stem, []).append(path)
    chosen = _chosen(paths, wanted, str(folder))
    for stem in chosen.values():
        if len(paths[stem]) > 1:
            raise BadSplit(
                f"{folder} has {' and '.join(path.name for path in paths[stem])}, expected one "
                f"file for a split; move the others away"
            )
    return {split: paths[stem][0] for split, stem in chosen.items()}


def _beside(path: Path, wanted: Wanted) -> dict[str, Path]:
    """One file as train, with those named for dev and test."""
    given = dict(wanted.splits or {})
    if "train" in given:
        raise SettingError(
            f"{path} is a file, so it is the train split, but train={given['train']!r} was given "
            "too; leave train out"
        )
    return {"train": path, **{split: Path(name) for split, name in given.items()}}


def _apart(paths: Mapping[str, Path]) -> None:
    """Raises BadSplit for one file that is to be two splits, however it is written."""
    taken: dict[Path, str] = {}
    for split, path in paths.items():
        other = taken.setdefault(path.expanduser().resolve(), split)
        if other != split:
            raise BadSplit(
                f"{path} is named for {other} and for {split}; a file can be one split only: name "
                "another one, or leave it out to have the split carved out of train"
            )


def _chosen(available: Collection[str], wanted: Wanted, where: str) -> dict[str, str]:
    """Split -> its name in the source: as the caller says, else by the usual names."""
    chosen = dict(wanted.splits or {})
    for split, theirs in chosen.items():
        if theirs not in available:
            raise BadSplit(f"{where} has no {theirs!r} for {split}. {near(theirs, available)}")
    if len(set(chosen.values())) < len(chosen):
        raise BadSplit(f"{where}: {chosen} names one part twice; a part can be one split only")
    taken = set(chosen.values())
    for split in SPLITS:
        usual = [name for name in ALIASES[split] if name in available and name not in taken]
        if split not in chosen and usual:
            chosen[split] = usual[0]
    if "train" not in chosen:
        raise BadSplit(
            f"{where} has no train split; found {', '.join(sorted(available)) or 'nothing'}. "
            "Say which part it is with train="
        )
    return chosen
