"""bm25s, imported without JAX.

bm25s tries a top-k through JAX when it is imported, which takes hold of the accelerator: a reward
function's process, or a script whose training runs in other processes, must not. Its own selection
is not used here.
"""

from __future__ import annotations

import logging
import sys

_jax = sys.modules.get("jax")
sys.modules["jax"] = None  # type: ignore[assignment]  # `import jax` raises ImportError
try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
finally:
    if _jax is None:
        del sys.modules["jax"]
    else:
        sys.modules["jax"] = _jax

# It sets its own logger to DEBUG.
logging.getLogger("bm25s").setLevel(logging.WARNING)

__all__ = ["STOPWORDS_EN", "bm25s"]
