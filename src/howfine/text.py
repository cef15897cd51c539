"""Text of YAML files, read with errors that say what was found where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from howfine.errors import SettingError


def one(raw: Any, where: str) -> tuple[str, dict[str, Any]]:
    """A name alone, or {name: settings}."""
    if isinstance(raw, str):
        return raw, {}
    if isinstance(raw, dict) and len(raw) == 1:
        ((name, settings),) = raw.items()
        return str(name), mapping(settings, where)
    raise SettingError(f"{where}: expected a name, or one name with its settings; found {raw!r}")


def mapping(raw: Any, where: str) -> dict[str, Any]:
    """Settings by name; nothing for none."""
    if raw is None:
        return {}
    if isinstance(raw, dict):
        return {str(key): value for key, value in raw.items()}
    raise SettingError(f"{where}: expected settings by name, such as 'epochs: 3'; found {raw!r}")


def text_of(path: Path) -> str:
    """A recipe file's text; raises SettingError where it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"recipe file {path} can't be read as text: {error}") from error


def parsed(text: str, where: str) -> Any:
    """What a YAML text holds; raises SettingError, naming `where`, for what is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"{where} is not YAML: {reason}; correct it") from error
