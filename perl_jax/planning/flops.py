"""Floating-point operations of a traced function, of all devices together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core


def flops(jaxpr: Any, *, unknown_trips: int | None = None) -> int:
    """Operations of matrix products and convolutions in `jax.jit(f).trace(*args).jaxpr`.

    2 m n k a product, batched ones times the batch, 2 x outputs x window x input features a
    convolution; times the lengths of scans, the shards of a shard_map, the grid of a Pallas kernel
    without a cost estimate. Of branches the dearest counts. What jax.checkpoint computes again
    counts again; what XLA later finds dead counts too. unknown_trips: how often each while loop
    runs; ValueError when there is one and no count.
    """
    return sum(
        _equation(equation, unknown_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def _equation(equation: core.JaxprEqn, trips: int | None) -> int:
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
    contracted, _ = equation.params["dimension_numbers"][0]
    lhs, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """The kernel's input features are already those of one group."""
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features_out = equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(out) * (math.prod(kernel) // kernel[features_out])


def _while(params: Mapping[str, Any], trips: int | None) -> int:
    if trips is None:
        raise ValueError("How often a while loop runs is not in the program; give unknown_trips.")
    body, condition = (
        flops(params[part], unknown_trips=trips) for part in ("body_jaxpr", "cond_jaxpr")
    )
    return trips * body + (trips + 1) * condition


def _shards(params: Mapping[str, Any]) -> int:
    """How many devices run a shard_map's function: its mesh, along the axes it makes manual."""
    mesh = params["mesh"].shape
    return math.prod(
        mesh[axis]
        for axis in params.get("newly_manual_axes", params.get("manual_axes", tuple(mesh)))
    )


def _grid(params: Mapping[str, Any]) -> int:
    grid = params["grid_mapping"].grid
    if not all(isinstance(size, int) for size in grid):
        raise ValueError(
            f"The Pallas kernel's grid {grid} is known only at run time; give it a cost_estimate."
        )
    return math.prod(grid)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The functions an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                yield item
