"""The page of a run: what was done, how close it came, on what and at what cost, in one HTML file.

`dfq.report` names this package and a function of `dfq`, whichever is imported first: called, the
package is the function.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ..errors import for_python
        from .verb import report

        return for_python(report)(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
