"""Choice of the attention implementation, and kernels: splash on TPUs, cuDNN on GPUs.

Both kernels equal `attention.attend` with a causal mask, a window and padding, at every real token.
Outputs at padded tokens are finite but differ; nothing that reads them may count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jax.sharding import Mesh, PartitionSpec

from perl_jax.models import attention
from perl_jax.models.config import ModelConfig
from perl_jax.runtime.sharding import BATCH_AXES
from perl_jax.types import Array

# Name of splash's residuals other than its inputs: the output and each query's log-sum-exp. With
# `jax.checkpoint_policies.save_only_these_names(RESIDUALS)`, rematerialisation does not run the
# forward kernel a second time.
RESIDUALS = "splash_residuals"

# The kernel works on tiles of 128 lanes. Longer blocks have less overhead per step and read keys
# less often; above 512 the work above the causal diagonal outweighs that.
LANES, LARGEST_BLOCK = 128, 512
# Largest number of key blocks for which one backward kernel is faster than two.
FUSED_BLOCKS = 4


class AttentionChoice(NamedTuple):
    """An attention implementation, and why it is selected.

    Attributes:
        path: The implementation, a value of `ModelConfig.attention`.
        why: The reason, as a clause without a full stop.
    """

    path: Literal["plain", "blocked", "splash", "cudnn"]
    why: str


def choose_attention(
    platform: str, config: ModelConfig, capability: str | None = None, devices: int = 1
) -> AttentionChoice:
    """Returns the default attention implementation for whole sequences, and the reason.

    TPUs: splash for every model. GPUs: cudnn for bfloat16 activations, no cap, and a head_dim that
    is a multiple of 8 and at most 128, or 256 on compute capability 9.x (later ones have no
    backward pass above 128); else blocked. CPUs: blocked on a single device, plain on several.

    Args:
        platform: cpu, gpu, cuda or tpu; the name of any other platform gives blocked.
        config: The model.
        capability: The device's `compute_capability`, such as "9.0"; None counts as 8.0, the first
            that cuDNN supports.
        devices: Number of devices; read on CPUs only.
    """
    if platform == "tpu":
        return AttentionChoice("splash", "JAX's kernel for TPUs takes every model")
    if platform == "cpu":
        return (
            AttentionChoice("blocked", "on one CPU device pieces stay in its caches")
            if devices == 1
            else AttentionChoice("plain", "rows are split over several CPU devices")
        )
    major = "8" if capability is None else capability.partition(".")[0]
    # The compute capability of GPUs of other makers is a name, not a number.
    if platform not in ("gpu", "cuda") or not major.isdigit() or int(major) < 8:
        return AttentionChoice(
            "blocked",
            "cuDNN's kernel needs compute capability 8.0 or more, and this device has "
            f"{capability or platform}",
        )
    largest = 256 if int(major) == 9 else 128
    if config.dtype != "bfloat16":
        return AttentionChoice(
            "blocked", f"cuDNN's kernel needs bfloat16, and activations are {config.dtype}"
        )
    if config.attention_cap is not None:
        return AttentionChoice(
            "blocked",
            "cuDNN's kernel has no cap on logits, and the model caps them at "
            f"{config.attention_cap:g}",
        )
    if config.head_dim % 8 or config.head_dim > largest:
        return AttentionChoice(
            "blocked",
            f"cuDNN's kernel needs a head size that is a multiple of 8 and at most {largest}, and "
            f"it is {config.head_dim}",
        )
    return AttentionChoice(
        "cudnn",
        "activations are bfloat16, logits are not capped, and cuDNN's kernel has the head size "
        f"{config.head_dim}",
    )


def effective_window(window: int | None, length: int) -> int | None:
    """Returns the window, or None if it hides no key in rows of `length` tokens."""
    return None if window is None or window >= length else window


def cond_on_window(
    flag: Array, call_windowed: Callable[[], jax.Array], call_full: Callable[[], jax.Array]
) -> jax.Array:
    """Returns the result of one of two calls, selected by a traced flag; only that call runs.

    For a layer scan in which only some layers have a window. The gradient keeps the residuals of
    both calls, one of them zeros; inside a rematerialised layer they exist for one layer at a time.

    Args:
        flag: Boolean scalar: whether the layer has a window.
        call_windowed: Computes attention with the window.
        call_full: Computes attention without a window.
    """
    return jax.lax.cond(flag, call_windowed, call_full)


def splash(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    valid_BT: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the output of causal attention, out_BTHK, by JAX's kernel for TPUs.

    A window counts columns here, and real tokens in `attention.within_window`. Both are the same if
    padding is only at the beginning or end. The compiler cannot partition the kernel, so each
    device of a mesh runs it on its own rows and heads. Any head_dim and length works; lengths are
    padded to whole blocks inside.

    Args:
        q_BTHK: Queries.
        k_BTNK: Keys.
        v_BTNK: Values.
        valid_BT: True on real tokens.
        window: Number of tokens that a token sees, itself included; None: all before it.
        scale: Factor of q k^T.
        cap: Cap of the logits (`attention.soft_cap`); None: no cap.
        mesh: Mesh of the arguments; None: a single device.
        interpret: Run the kernel's program on any platform, slowly.
    """
    attend = functools.partial(_splash, window=window, scale=scale, cap=cap, interpret=interpret)
    if q_BTHK.dtype == jnp.float32:
        attend = functools.partial(_in_float32, attend)
    return _by_shard(attend, mesh, q_BTHK, k_BTNK, v_BTNK, valid_BT)


def cudnn(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    valid_BT: Array,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    mesh: Mesh | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Returns the output of causal attention, out_BTHK, by cuDNN through `jax.nn`.

    Each row's real tokens are moved to the front, where a causal mask alone hides the padding, and
    back afterwards. A window counts real tokens, as in `attention.within_window`. Inputs are
    float16, or what `choose_attention` says.

    Args:
        q_BTHK: Queries.
        k_BTNK: Keys.
        v_BTNK: Values.
        valid_BT: True on real tokens.
        window: Number of tokens that a token sees, itself included; None: all before it.
        scale: Factor of q k^T.
        cap: Must be None.
        mesh: Mesh of the arguments; None: a single device.
        implementation: cudnn; xla: the same by XLA operations, on any platform.

    Raises ValueError if there is a cap.
    """
    if cap is not None:
        raise ValueError("cuDNN's attention has no cap; use the attention plain or blocked")
    attend = functools.partial(_cudnn, window=window, scale=scale, implementation=implementation)
    return _by_shard(attend, mesh, q_BTHK, k_BTNK, v_BTNK, valid_BT)


def blocked(
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    mask_BTS: Array,
    read_BT: Array,
    *,
    scale: float,
    cap: float | None,
    mesh: Mesh,
    wide: bool,
) -> jax.Array:
    """Returns out_BTHK of `attention.attend_blocked`, each device computing its own rows and heads.

    Otherwise the loop over rows would bring all rows to every device.

    Args:
        q_BTHK: Queries.
        k_BTNK: Keys.
        v_BTNK: Values.
        mask_BTS: Causal mask.
        read_BT: True on queries whose output is used.
        scale: Factor of q k^T.
        cap: Cap of the logits (`attention.soft_cap`); None: no cap.
        mesh: Mesh of the arguments.
        wide: Whether the devices are accelerators (`attention.attend_blocked`).
    """

    def attend(q_BTHK, k_BTNK, v_BTNK, read_BT, mask_BTS):
        return attention.attend_blocked(
            q_BTHK, k_BTNK, v_BTNK, mask_BTS, scale, cap, read_BT=read_BT, wide=wide
        )

    return _by_shard(attend, mesh, q_BTHK, k_BTNK, v_BTNK, read_BT, mask_BTS)


def _by_shard(
    attend: Callable[..., jax.Array],
    mesh: Mesh | None,
    q_BTHK: Array,
    k_BTNK: Array,
    v_BTNK: Array,
    valid_BT: Array,
    *of_rows: Array,
) -> jax.Array:
    """Returns attend(q, k, v, valid, ...) with each device computing its own rows and heads.

    Rows or heads that the mesh does not divide are computed by every device.

    Args:
        attend: The attention function of one device, -> out_BTHK.
        mesh: Mesh of the arguments; None: a single device.
        q_BTHK: Queries.
        k_BTNK: Keys.
        v_BTNK: Values.
        valid_BT: True on real tokens, or another array [B, T] that `attend` takes in this place.
        of_rows: Further arrays [B, ...] for `attend`.
    """
    batch, length, heads, _ = q_BTHK.shape
    kv_heads = k_BTNK.shape[2]
    chex.assert_equal_shape([k_BTNK, v_BTNK])
    chex.assert_shape(valid_BT, (batch, length))
    chex.assert_is_divisible(heads, kv_heads)
    if mesh is None:
        return attend(q_BTHK, k_BTNK, v_BTNK, valid_BT, *of_rows)
    rows = BATCH_AXES if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    # If key/value heads divide, so do query heads, and groups of heads stay whole.
    tensor = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, tensor, None)
    # check_vma is off, because kernels do not declare over which axes their outputs vary.
    by_row = PartitionSpec(rows)
    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(spec, spec, spec, by_row, *[by_row] * len(of_rows)),
        out_specs=spec,
        check_vma=False,
    )
    return sharded(q_BTHK, k_BTNK, v_BTNK, valid_BT, *of_rows)


def blocks_of(length: int) -> tuple[int, int]:
    """Returns (number of blocks, tokens per block) for rows of `length` tokens.

    There are as few blocks as LARGEST_BLOCK allows. A block is the smallest multiple of LANES that
    suffices, so the blocks together may be longer than the row.
    """
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES


def block_sizes(blocks: int, block: int, window: int | None) -> splash_lib.BlockSizes:
    """Returns splash's block sizes: square blocks, and whether the backward pass is one kernel.

    The fused backward kernel forms the weights once for dq, dk and dv instead of twice. But it
    writes each key block's share of dq for all queries, masked blocks included: as many copies of
    dq as there are key blocks, rounded before they are added. It pays if there are few blocks and
    most of them are visible, which is not so with a window.

    Args:
        blocks: Number of blocks per row.
        block: Number of tokens per block.
        window: The effective window in tokens; None: no window.
    """
    fused = window is None and blocks <= FUSED_BLOCKS
    dq = None if fused else block
    return splash_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=dq,
        block_kv_dq=dq,
        use_fused_bwd_kernel=fused,
    )


def _splash(
    q_BTHK,
    k_BTNK,
    v_BTNK,
    valid_BT,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    interpret: bool,
) -> jax.Array:
    """Returns the output of `splash` on one device."""
    length, heads = q_BTHK.shape[1:3]
    blocks, block = blocks_of(length)
    padding = ((0, 0), (0, blocks * block - length), (0, 0), (0, 0))
    head_first = lambda x_BTHK: jnp.swapaxes(jnp.pad(x_BTHK, padding), 1, 2)
    # The kernel has no scale: queries are scaled in float32 and rounded once.
    scaled_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    # Real tokens are one segment and padding another, so every query sees at least itself.
    segment_BT = jnp.pad(valid_BT.astype(jnp.int32), padding[:2])
    shape, window = (blocks * block, blocks * block), effective_window(window, length)
    mask = (
        splash_lib.CausalMask(shape)
        if window is None
        else splash_lib.LocalMask(shape, (window - 1, 0), 0)
    )
    kernel = splash_lib.make_splash_mha_single_device(
        splash_lib.MultiHeadMask([mask] * heads),
        block_sizes=block_sizes(blocks, block, window),
        attn_logits_soft_cap=cap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    segments = splash_lib.SegmentIds(q=segment_BT, kv=segment_BT)
    out_BHTK = jax.vmap(kernel)(
        head_first(scaled_BTHK), head_first(k_BTNK), head_first(v_BTNK), segments
    )
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_float32(
    attend: Callable[..., jax.Array],
    q_BTHK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    valid_BT: jax.Array,
) -> jax.Array:
    """Returns attend(q, k, v, valid) with its products in float32, in both passes.

    JAX's kernel does not state a precision, so both passes are traced with the highest as the
    default (`precision.precision_of`).
    """
    with jax.default_matmul_precision("highest"):
        return attend(q_BTHK, k_BTNK, v_BTNK, valid_BT)


def _in_float32_forward(attend, q_BTHK, k_BTNK, v_BTNK, valid_BT):
    with jax.default_matmul_precision("highest"):
        return jax.vjp(lambda *qkv: attend(*qkv, valid_BT), q_BTHK, k_BTNK, v_BTNK)


def _in_float32_backward(attend, backward, cotangent_BTHK):
    with jax.default_matmul_precision("highest"):
        return *backward(cotangent_BTHK), None


_in_float32.defvjp(_in_float32_forward, _in_float32_backward)


def _cudnn(
    q_BTHK, k_BTNK, v_BTNK, valid_BT, *, window: int | None, scale: float, implementation: str
) -> jax.Array:
    """Returns the output of `cudnn` on one device."""
    # cuDNN's other options are worse: lengths cover trailing padding only; a mask becomes a
    # [B, 1, T, T] bias, which is slow, has its gradient computed, and excludes windows before cuDNN
    # 9.10.2.
    order_BT = jnp.argsort(~valid_BT.astype(bool), axis=1, stable=True)
    column_BT = jnp.argsort(order_BT, axis=1)
    q_BTHK, k_BTNK, v_BTNK = (_permuted(x, order_BT, column_BT) for x in (q_BTHK, k_BTNK, v_BTNK))
    window = effective_window(window, q_BTHK.shape[1])
    local = None if window is None else (window - 1, 0)
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BTNK,
        v_BTNK,
        scale=scale,
        is_causal=True,
        local_window_size=local,
        implementation=implementation,
    )
    return _permuted(out_BTHK, column_BT, order_BT)


@jax.custom_vjp
def _permuted(x_BTHK: jax.Array, order_BT: jax.Array, inverse_BT: jax.Array) -> jax.Array:
    """Returns x[b, order[b, t]]; the gradient is a gather (JAX's own is a scatter).

    Args:
        x_BTHK: Any array.
        order_BT: Column that each column of the result is taken from.
        inverse_BT: The inverse permutation of `order_BT`.
    """
    return jnp.take_along_axis(x_BTHK, order_BT[:, :, None, None], axis=1, mode="promise_in_bounds")


def _permuted_forward(x_BTHK, order_BT, inverse_BT):
    return _permuted(x_BTHK, order_BT, inverse_BT), (order_BT, inverse_BT)


def _permuted_backward(kept, cotangent_BTHK):
    """Returns the gradient of x: the inverse permutation of the cotangent."""
    order_BT, inverse_BT = kept
    return _permuted(cotangent_BTHK, inverse_BT, order_BT), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
