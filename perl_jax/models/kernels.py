"""Which attention whole sequences take, and the platforms' own kernels: splash on TPUs, cuDNN's on
GPUs.

Both kernels equal `attention.attend` under a causal mask, a window and padding, at every real
token. What a padded token gets is finite and otherwise unlike: nothing that reads it may count.
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

# What splash keeps for its backward pass besides its inputs, the output and each query's log sum,
# has this name: with `jax.checkpoint_policies.save_only_these_names(RESIDUALS)` rematerialisation
# does not run the forward kernel a second time.
RESIDUALS = "splash_residuals"

# The kernel works on tiles of 128 lanes. Longer blocks spend less on each step and on reading keys
# again; past 512 what they compute above the causal diagonal outweighs that.
LANES, LARGEST_BLOCK = 128, 512
# Key blocks up to which one backward kernel does the work of two.
FUSED_BLOCKS = 4


class Choice(NamedTuple):
    """An attention path, and why it is taken: a clause without a full stop."""

    path: Literal["plain", "blocked", "splash", "cudnn"]
    why: str


def choose(
    platform: str, config: ModelConfig, capability: str | None = None, devices: int = 1
) -> Choice:
    """Returns what whole sequences are attended to with, unless the user says otherwise, and why.

    TPUs: splash, whatever the model. GPUs: cudnn for bfloat16 activations, no cap, and a head_dim
    that is a multiple of 8 and at most 128, or 256 on compute capability 9.x (later ones have no
    backward pass beyond 128); blocked otherwise. CPUs: blocked on a single one, plain on several.

    capability: the device's `compute_capability`; None counts as 8.0, the first that cuDNN takes.
    """
    if platform == "tpu":
        return Choice("splash", "JAX's kernel for TPUs takes every model")
    if platform == "cpu":
        return (
            Choice("blocked", "on one CPU device pieces stay in its caches")
            if devices == 1
            else Choice("plain", "rows are split over several CPU devices")
        )
    major = "8" if capability is None else capability.partition(".")[0]
    # Other makers' GPUs have names there, not numbers.
    if platform not in ("gpu", "cuda") or not major.isdigit() or int(major) < 8:
        return Choice(
            "blocked",
            "cuDNN's kernel needs compute capability 8.0 or more, and this device has "
            f"{capability or platform}",
        )
    largest = 256 if int(major) == 9 else 128
    if config.dtype != "bfloat16":
        return Choice(
            "blocked", f"cuDNN's kernel needs bfloat16, and activations are {config.dtype}"
        )
    if config.attention_cap is not None:
        return Choice(
            "blocked",
            "cuDNN's kernel has no cap on logits, and the model caps them at "
            f"{config.attention_cap:g}",
        )
    if config.head_dim % 8 or config.head_dim > largest:
        return Choice(
            "blocked",
            f"cuDNN's kernel needs a head size that is a multiple of 8 and at most {largest}, and "
            f"it is {config.head_dim}",
        )
    return Choice(
        "cudnn",
        "activations are bfloat16, logits are not capped, and cuDNN's kernel has the head size "
        f"{config.head_dim}",
    )


def narrower(window: int | None, length: int) -> int | None:
    """The window, or None where it hides nothing: with `length` columns or more."""
    return None if window is None or window >= length else window


def by_window(
    flag: Array, call_windowed: Callable[[], jax.Array], call_full: Callable[[], jax.Array]
) -> jax.Array:
    """One of two calls by a traced flag, for a layer scan whose layers differ; only that one runs.

    Differentiating it keeps both calls' residuals, one of them zeros: inside a rematerialised layer
    that is one layer's.
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
    """out_BTHK: causal attention of real tokens to real tokens, by JAX's kernel for TPUs.

    A window counts columns where `attention.within` counts real tokens: the same where padding only
    leads or trails. The compiler cannot partition the kernel, so over a mesh each device runs it on
    its rows and heads. Any head_dim and length; lengths are padded to whole blocks inside.

    interpret: runs the kernel's program on any platform, slowly.
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
    """out_BTHK: causal attention of real tokens to real tokens, by cuDNN through `jax.nn`.

    Each row's real tokens are moved to its front, where a causal mask alone hides the padding, and
    back again. cuDNN's other ways are worse: lengths cover trailing padding only, and a mask
    becomes a [B, 1, T, T] bias that is slow, has a gradient computed, and excludes windows before
    cuDNN 9.10.2. A window counts real tokens, as in `attention.within`.

    cuDNN takes what `choose` says (float16 too). Raises ValueError with a cap, which it does not
    have.
    """
    if cap is not None:
        raise ValueError("cuDNN's attention has no cap: attend in plain operations")
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
    """out_BTHK by `attention.attend_blocked`, each device on its rows and heads: looped over
    otherwise, rows would come to every device.
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
    """Each device's share of rows and heads; what the mesh does not divide is done by all of it.
    of_rows: more arrays [B, ...] for attend.
    """
    batch, length, heads, _ = q_BTHK.shape
    kv_heads = k_BTNK.shape[2]
    chex.assert_equal_shape([k_BTNK, v_BTNK])
    chex.assert_shape(valid_BT, (batch, length))
    chex.assert_is_divisible(heads, kv_heads)
    if mesh is None:
        return attend(q_BTHK, k_BTNK, v_BTNK, valid_BT, *of_rows)
    rows = BATCH_AXES if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    # Heads are in groups: where key/value heads divide, so do query heads, and groups stay whole.
    tensor = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, tensor, None)
    # Kernels do not say over which axes their outputs vary, so that cannot be checked.
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
    """(blocks, block): as few blocks as LARGEST_BLOCK allows, as short as multiples of LANES can
    be.
    """
    blocks = -(-length // LARGEST_BLOCK)
    return blocks, -(-length // (blocks * LANES)) * LANES


def block_sizes(blocks: int, block: int, window: int | None) -> splash_lib.BlockSizes:
    """Square blocks in both directions, and whether the backward pass is one kernel.

    The fused kernel forms the weights once for dq, dk and dv instead of twice, but writes each key
    block's share of dq for all queries, blocks that are masked out included: so many copies of the
    queries, rounded to their dtype before they are added. That pays while copies are few and most
    blocks count, which under a window they do not.
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
    """`splash` on one device."""
    length, heads = q_BTHK.shape[1:3]
    blocks, block = blocks_of(length)
    room = ((0, 0), (0, blocks * block - length), (0, 0), (0, 0))
    head_first = lambda x_BTHK: jnp.swapaxes(jnp.pad(x_BTHK, room), 1, 2)
    # The kernel has no scale of its own; in float32 the queries are rounded once.
    scaled_BTHK = (q_BTHK.astype(jnp.float32) * scale).astype(q_BTHK.dtype)
    # Real tokens are one segment and padding is another: every query sees at least itself.
    segment_BT = jnp.pad(valid_BT.astype(jnp.int32), room[:2])
    shape, window = (blocks * block, blocks * block), narrower(window, length)
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
    """attend(q, k, v, valid) whose products are taken with the precision of
    `precision.precision_of` float32.

    JAX's kernel states no precision, so both passes are traced where the default is the highest.
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
    """`cudnn` on one device."""
    order_BT = jnp.argsort(~valid_BT.astype(bool), axis=1, stable=True)
    column_BT = jnp.argsort(order_BT, axis=1)
    q_BTHK, k_BTNK, v_BTNK = (_permuted(x, order_BT, column_BT) for x in (q_BTHK, k_BTNK, v_BTNK))
    window = narrower(window, q_BTHK.shape[1])
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
    """x[b, order[b, t]]; its gradient is a gather too, where JAX's own would be a scatter with
    sums.
    """
    return jnp.take_along_axis(x_BTHK, order_BT[:, :, None, None], axis=1, mode="promise_in_bounds")


def _permuted_forward(x_BTHK, order_BT, inverse_BT):
    return _permuted(x_BTHK, order_BT, inverse_BT), (order_BT, inverse_BT)


def _permuted_backward(kept, cotangent_BTHK):
    order_BT, inverse_BT = kept
    return _permuted(cotangent_BTHK, inverse_BT, order_BT), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
