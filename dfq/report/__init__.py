"""The page of a run: what was done, how close it came, on what and at what cost, in one HTML file.

`dfq.report` names this package and a function of `dfq`, whichever is imported first: called, the
package is the function.
"""

from __future__ import annotations

from ..runtime.package_call import make_callable

make_callable(__name__, "api.report")
