# flax.struct.dataclass makes a frozen dataclass.
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")

def field(
    *,
    pytree_node: bool = True,
    default: Any = ...,
    default_factory: Callable[[], Any] = ...,
) -> Any: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def dataclass(clz: type[T]) -> type[T]: ...
