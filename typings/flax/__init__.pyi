# What a check of types needs to know of flax, which its environment does not hold.
from typing import Any

def __getattr__(name: str) -> Any: ...
