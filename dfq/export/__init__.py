"""From a detector to a file that a runtime executes, and back: what is in such a file, how it is
run, and whether it is right.

`dfq.export` names this package and a function of `dfq`, as `dfq.report` does.
"""

from __future__ import annotations

from ..runtime.package_call import make_callable

make_callable(__name__, "api.export")
