"""From a detector to a file that a runtime executes, and back: what is in such a file, how it is
run, and whether it is right.

`dfq.export` names this package and a function of `dfq`, as `dfq.sensitivity` does.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ..errors import for_python
        from ..exporting import export

        return for_python(export)(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
