"""Counts the floating-point operations of a traced function, over all devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core


def flops(jaxpr: Any, *, unknown_trips: int | None = None) -> int:
    """Returns the number of floating-point operations of matrix products and convolutions in a
    jaxpr, over all devices.

    An [m, k] x [k, n] product counts 2 m n k, times its batch dimensions. A convolution counts 2 x
    outputs x window x input features. Counts are multiplied by the lengths of scans, the shards of
    a shard_map, and the grid of a Pallas kernel without a cost estimate. Of the branches of a
    conditional only the most expensive one counts. Operations that jax.checkpoint recomputes count
    again. Operations that XLA later removes as dead code count too.

    Args:
        jaxpr: `jax.jit(f).trace(*args).jaxpr`.
        unknown_trips: The number of iterations of each while loop.

    Raises:
        ValueError: There is a while loop and no `unknown_trips`, or a Pallas kernel without a cost
            estimate has a grid that is known only at run time.
    """
    return sum(
        _equation(equation, unknown_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def _equation(equation: core.JaxprEqn, trips: int | None) -> int:
    """Returns the operations of one equation, including those of the functions that it calls.

    Args:
        equation: The equation.
        trips: The number of iterations of each while loop; None if unknown.
    """
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return params["length"] * flops(params["jaxpr"], unknown_trips=trips)
    if name == "while":
        return _while(params, trips)
    if name == "cond":
        return max(flops(branch, unknown_trips=trips) for branch in params["branches"])
    inner = sum(flops(jaxpr, unknown_trips=trips) for jaxpr in _jaxprs(params))
    if name == "shard_map":
        return _shards(params) * inner
    if name == "pallas_call":
        estimate = params["cost_estimate"]
        return inner * _grid(params) if estimate is None else estimate.flops
    return inner


def _dot(equation: core.JaxprEqn) -> int:
    """Returns the operations of a `dot_general`."""
    contracted, _ = equation.params["dimension_numbers"][0]
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Returns the operations of a `conv_general_dilated`."""
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features_out = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out) * (math.prod(kernel) // kernel[features_out])


def _while(params: Mapping[str, Any], trips: int | None) -> int:
    """Returns the operations of a while loop that runs `trips` times; raises ValueError if `trips`
    is None.
    """
    if trips is None:
        raise ValueError("How often a while loop runs is not in the program; give unknown_trips.")
    body, condition = (
        flops(params[part], unknown_trips=trips) for part in ("body_jaxpr", "cond_jaxpr")
    )
    return trips * body + (trips + 1) * condition


def _shards(params: Mapping[str, Any]) -> int:
    """Returns on how many devices a shard_map runs its function: the product of the mesh sizes of
    its manual axes.
    """
    mesh = params["mesh"].shape
    return math.prod(
        mesh[axis]
        for axis in params.get("newly_manual_axes", params.get("manual_axes", tuple(mesh)))
    )


def _grid(params: Mapping[str, Any]) -> int:
    """Returns the number of steps of a Pallas kernel's grid; raises ValueError if it is known only
    at run time.
    """
    grid = params["grid_mapping"].grid
    if not all(isinstance(size, int) for size in grid):
        raise ValueError(
            f"The Pallas kernel's grid {grid} is known only at run time; give it a cost_estimate."
        )
    return math.prod(grid)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the functions (jaxprs) that an equation calls, from its parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                yield item
