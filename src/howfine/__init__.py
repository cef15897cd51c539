"""How small can the task-specific change to a pretrained model be?

The public names, resolved on first use: `import howfine` loads neither torch nor transformers.

Several verbs are named like the module they live in. Such a module is made callable, so that
`howfine.tune(base, task, recipe)`, `from howfine.tune import Recipe` and `import howfine.tune as m`
all mean what they say, in any order.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as _HOME, for type checkers and editors; a test compares them
    from inspect import Signature

    from howfine.attach import attach
    from howfine.base import Base
    from howfine.combine import combine
    from howfine.compare import compare as distance
    from howfine.compose import compose
    from howfine.cost import parts as inspect
    from howfine.delta import Delta
    from howfine.directions import classify, encoder
    from howfine.distance import Distance
    from howfine.distill import distilled
    from howfine.errors import HowfineError
    from howfine.evaluate import Score, evaluate, predict
    from howfine.export import export
    from howfine.extract import extract
    from howfine.merge import merge
    from howfine.method import Method, methods
    from howfine.readout import Readout, readouts
    from howfine.recipe import Recipe
    from howfine.report import report
    from howfine.search import search
    from howfine.semi_structured import semi_structured
    from howfine.slicing import sliced
    from howfine.study import study
    from howfine.task import Task
    from howfine.tune import tune
    from howfine.zero_shot import meta_train, zero_shot

    __version__: str

__all__ = [
    "Base",
    "Delta",
    "Distance",
    "HowfineError",
    "Method",
    "Readout",
    "Recipe",
    "Score",
    "Task",
    "__version__",
    "attach",
    "classify",
    "combine",
    "compose",
    "distance",
    "distilled",
    "encoder",
    "evaluate",
    "export",
    "extract",
    "inspect",
    "merge",
    "meta_train",
    "methods",
    "predict",
    "readouts",
    "report",
    "search",
    "semi_structured",
    "sliced",
    "study",
    "tune",
    "zero_shot",
]

# Public name -> the module that defines it, with the name it has there where that is another.
_HOME = {
    "Base": "base",
    "Delta": "delta",
    "Distance": "distance",
    "HowfineError": "errors",
    "Method": "method",
    "Readout": "readout",
    "Recipe": "recipe",
    "Score": "evaluate",
    "Task": "task",
    "attach": "attach",
    "classify": "directions",
    "combine": "combine",
    "compose": "compose",
    "distance": "compare:compare",
    "distilled": "distill",
    "encoder": "directions",
    "evaluate": "evaluate",
    "export": "export",
    "extract": "extract",
    "inspect": "cost:parts",
    "merge": "merge",
    "meta_train": "zero_shot",
    "methods": "method",
    "predict": "evaluate",
    "readouts": "readout",
    "report": "report",
    "search": "search",
    "semi_structured": "semi_structured",
    "sliced": "slicing",
    "study": "study",
    "tune": "tune",
    "zero_shot": "zero_shot",
}


def _resolve(name: str) -> Any:
    module, _, other = _HOME[name].partition(":")
    return getattr(import_module(f"howfine.{module}"), other or name)


class _CallableModule(ModuleType):
    """A submodule that, when called, is the public function of its own name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _resolve(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:  # what help() and editors show
        from inspect import signature

        return signature(_resolve(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    """This package. Python binds each imported submodule to it, over a function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("howfine")
    if name not in _HOME:
        raise AttributeError(f"module 'howfine' has no attribute {name!r}; see howfine.__all__")
    value = _resolve(name)
    # Importing the home may have bound a callable submodule to this name: it is the one to keep.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
