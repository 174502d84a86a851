"""Mixed precision: what each layer's bits cost the predictions, and where bits are best spent.

`dfq.sensitivity` names this package and a function of `dfq`, whichever is imported first: called,
the package is the function.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ..errors import for_python
        from ..verbs import sensitivity

        return for_python(sensitivity)(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
