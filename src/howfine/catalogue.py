"""The catalogue of methods: names, one-line summaries, settings with their help and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from howfine import plugins
from howfine.errors import SettingError, near
from howfine.method import Method


def catalogue(name: str | None = None) -> list[dict[str, Any]]:
    """Every method, or the one named. Raises SettingError with the near name."""
    examples = plugins.examples("methods", Method)
    if name is not None and name not in examples:
        raise SettingError(f"method {name!r} is unknown. {near(name, examples)}")
    return [_entry(key, type(example)) for key, example in examples.items() if name in (None, key)]


def _entry(name: str, cls: type[Method]) -> dict[str, Any]:
    module = inspect.getmodule(cls)
    about = inspect.getdoc(module) or ""
    helps = setting_help(cls)
    settings = [
        {"name": f.name, "type": str(f.type), "default": f.default, "help": helps.get(f.name, "")}
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    return {
        "name": name,
        "summary": " ".join(about.split("\n\n")[0].split()),
        "about": about,
        "settings": settings,
    }


def setting_help(cls: type) -> dict[str, str]:
    """The comment lines above each field of a dataclass: its help, said once."""
    found: dict[str, str] = {}
    comment: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("#"):
            comment.append(text.lstrip("# "))
            continue
        match = re.match(r"(\w+)\s*:", text)
        if match and comment:
            found[match.group(1)] = " ".join(comment)
        comment = []
    return found
