"""dfq: make a trained object detector small without its training data.

>>> import dfq
>>> dfq.synthesize("demo", out="set")            # labelled images out of the network itself
>>> run = dfq.quantize("w4a8", model="demo")     # a 4-bit network trained on them
>>> dfq.evaluate(run, "my-validation-set").AP
>>> dfq.predict(run, "my-photos", out="pictures")  # boxes, scores, categories; and drawn
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__ as __version__

_moved.install()

if TYPE_CHECKING:
    from .api.cost import cost as cost
    from .api.deploy import deploy as deploy
    from .api.evaluate import evaluate as evaluate
    from .api.export import export as export
    from .api.inspect import inspect as inspect
    from .api.predict import predict as predict
    from .api.quantize import quantize as quantize
    from .api.report import report as report
    from .api.sensitivity import sensitivity as sensitivity
    from .api.synthesize import synthesize as synthesize
    from .api.verify import verify as verify
    from .errors import UserError as UserError
    from .recipe import Recipe as Recipe
    from .recipe import load_recipe as load_recipe
    from .runs.comparison import compare as compare
    from .runs.folder import load_run as load_run
    from .runs.loading import load_detector as load_detector
    from .runs.loading import load_model as load_model

# Imported on first use: `dfq --help` need not wait seconds for torch and Ultralytics.
_HOMES = {
    "UserError": "errors",
    "load_recipe": "recipe",
    "Recipe": "recipe",
    "load_detector": "runs.loading",
    "load_model": "runs.loading",
    "load_run": "runs.folder",
    "synthesize": "api.synthesize",
    "quantize": "api.quantize",
    "sensitivity": "api.sensitivity",
    "evaluate": "api.evaluate",
    "inspect": "api.inspect",
    "predict": "api.predict",
    "compare": "runs.comparison",
    "deploy": "api.deploy",
    "export": "api.export",
    "verify": "api.verify",
    "cost": "api.cost",
    "report": "api.report",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dfq' has no attribute '{name}'")
    member = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if isinstance(member, type):
        return member
    if name in ("export", "report"):
        # A package has this name too, which importing it gives back in any case.
        return importlib.import_module(f".{name}", __name__)
    from .errors import for_python

    # Kept, so that the name stands for one function.
    return globals().setdefault(name, for_python(member))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
