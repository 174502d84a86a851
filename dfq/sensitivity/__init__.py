"""Mixed precision: what each layer's bits cost the predictions, and where bits are best spent.

`dfq.sensitivity` names this package and a function of `dfq`, whichever is imported first: called,
the package is the function.
"""

from __future__ import annotations

from ..package_call import make_callable

make_callable(__name__, "verbs")
