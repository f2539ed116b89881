"""The platforms' attention kernels against plain attention: values, gradients, compilation."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from perl_jax.models import attention, kernels
from perl_jax.models.config import ModelConfig
from perl_jax.runtime import sharding

# Seen on a CPU, normal inputs, up to 768 tokens: 1.4e-6 in values, 6e-6 in gradients of size 9.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, and the output's cotangent."""
    noise = np.random.default_rng(seed)
    return tuple(
        noise.standard_normal((batch, length, n, head_dim)).astype(np.float32)
        for n in (heads, kv_heads, kv_heads, heads)
    )


def padded(length: int) -> np.ndarray:
    """valid_BT: no padding, left, right, both, and an empty row."""
    third = length // 3
    spans = [(0, length), (third, length), (0, length - third), (third, length - third), (0, 0)]
    columns = np.arange(length)
    return np.stack([(columns >= start) & (columns < stop) for start, stop in spans])


def plain(q, k, v, valid_BT, *, window, scale, cap):
    mask_BTS, positions_BT = attention.causal_mask(valid_BT), attention.positions(valid_BT)
    if window is not None:
        mask_BTS = mask_BTS & attention.within_window(window, positions_BT, positions_BT)
    return attention.attend(q, k, v, mask_BTS, scale, cap)


def out_and_gradients(attend, q, k, v, cotangent, valid_BT) -> list[np.ndarray]:
    """Output and gradients in q, k, v of its real tokens; the padded tokens' output is only
    finite.
    """

    def total(q, k, v):
        out = attend(q, k, v, valid_BT)
        weight = jnp.where(valid_BT[:, :, None, None], cotangent, 0)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert out.dtype == q.dtype and [g.dtype for g in grads] == [q.dtype] * 3
    found = [np.asarray(x, np.float32) for x in (out, *grads)]
    assert all(np.isfinite(x).all() for x in found)
    return [found[0][valid_BT], *found[1:]]


def assert_equals_plain(attend, shape, valid_BT, window, cap):
    # No default scale, and logits of the size that a model's have.
    options = {"window": window, "scale": 1.3 * shape[-1] ** -0.5, "cap": cap}
    inputs = draw(len(valid_BT), valid_BT.shape[1], *shape)
    expected = out_and_gradients(functools.partial(plain, **options), *inputs, valid_BT)
    for got, want in zip(
        out_and_gradients(functools.partial(attend, **options), *inputs, valid_BT),
        expected,
        strict=True,
    ):
        np.testing.assert_allclose(got, want, **CLOSE)


splash = functools.partial(kernels.splash, mesh=None, interpret=True)
cudnn = functools.partial(kernels.cudnn, implementation="xla")


def blocked(q, k, v, valid_BT, *, window, scale, cap, mesh):
    """Attention in blocks over a mesh, as GPUs have it where no kernel fits."""
    positions_BT = attention.positions(valid_BT)
    mask_BTS = attention.causal_mask(valid_BT) & attention.within_window(
        window, positions_BT, positions_BT
    )
    return kernels.blocked(q, k, v, mask_BTS, valid_BT, scale=scale, cap=cap, mesh=mesh, wide=True)


@pytest.mark.parametrize(
    ("window", "cap"),
    [
        pytest.param(None, 2.0, id="cap"),
        pytest.param(70, None, id="window"),
        pytest.param(130, 2.0, id="window-cap", marks=pytest.mark.slow),
    ],
)
def test_splash_equals_plain_attention(monkeypatch, window, cap):
    # Two blocks and 56 columns of room, in groups of 3 query heads, with a head_dim of no power of
    # 2.
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)
    assert_equals_plain(splash, (6, 2, 20), padded(200), window, cap)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "shape", "window", "cap"),
    [
        (5, (2, 1, 8), None, None),
        (128, (2, 2, 64), None, None),
        (128, (2, 2, 80), 128, 3.0),
        (640, (2, 1, 128), None, None),
        (640, (2, 1, 96), 1, None),
        (640, (2, 1, 16), 600, None),
        (640, (2, 1, 256), 1000, None),
    ],
)
def test_splash_equals_plain_attention_at_other_sizes(length, shape, window, cap):
    assert_equals_plain(splash, shape, padded(length), window, cap)


@pytest.mark.slow
def test_splash_with_two_backward_kernels_equals_plain_attention(monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)
    assert not kernels.block_sizes(*kernels.blocks_of(600), None).use_fused_bwd_kernel
    assert_equals_plain(splash, (4, 2, 16), padded(600), None, None)


def test_a_window_of_all_columns_is_none():
    assert [kernels.effective_window(window, 8) for window in (None, 1, 7, 8, 9)] == [
        None,
        1,
        7,
        None,
        None,
    ]


def test_blocks_are_few_then_short():
    assert [
        kernels.blocks_of(length) for length in (1, 128, 129, 512, 513, 640, 1024, 1152, 2048)
    ] == [
        (1, 128),
        (1, 128),
        (1, 256),
        (1, 512),
        (2, 384),
        (2, 384),
        (2, 512),
        (3, 384),
        (4, 512),
    ]
    fused = [
        kernels.block_sizes(blocks, 512, window).use_fused_bwd_kernel
        for blocks, window in ((4, None), (5, None), (1, 100))
    ]
    assert fused == [True, False, False]


@pytest.mark.parametrize(
    ("shape", "window"),
    [((6, 2, 20), None), ((6, 2, 20), 1), ((6, 2, 20), 40), ((6, 2, 20), 1000), ((2, 2, 8), 7)],
)
def test_cudnn_path_equals_plain_attention(shape, window):
    # A row with a hole too: real tokens are moved together, so windows count what the plain ones
    # do.
    valid_BT = padded(41)
    valid_BT[0, [3, 4, 11, 30]] = False
    assert_equals_plain(cudnn, shape, valid_BT, window, None)


@pytest.mark.parametrize(
    ("attend", "length"),
    [(cudnn, 200), pytest.param(splash, 640, marks=pytest.mark.slow)],
    ids=["cudnn", "splash"],
)
def test_bfloat16_is_close_to_float32(attend, length):
    # Seen: 0.013 in values, 0.02 in gradients of size 7; bfloat16 has steps of 0.03 there.
    valid_BT, options = padded(length), {"window": 100, "scale": 0.125, "cap": None}
    low = [jnp.asarray(x, jnp.bfloat16) for x in draw(5, length, 4, 2, 64)]
    expected = out_and_gradients(
        functools.partial(plain, **options), *(x.astype(jnp.float32) for x in low), valid_BT
    )
    for got, want in zip(
        out_and_gradients(functools.partial(attend, **options), *low, valid_BT),
        expected,
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02)


def test_cudnn_has_no_cap():
    with pytest.raises(ValueError, match="no cap"):
        kernels.cudnn(
            *draw(1, 4, 2, 2, 8)[:3], np.ones((1, 4), bool), window=None, scale=1.0, cap=50.0
        )


@pytest.mark.parametrize(
    ("attend", "kv_heads", "rows"),
    [
        (cudnn, 2, 4),
        (cudnn, 1, 3),
        (functools.partial(kernels.splash, interpret=True), 2, 4),
        pytest.param(
            functools.partial(kernels.splash, interpret=True), 1, 3, marks=pytest.mark.slow
        ),
        (blocked, 2, 4),
        pytest.param(blocked, 1, 3, marks=pytest.mark.slow),
    ],
    ids=[
        "cudnn",
        "cudnn-indivisible",
        "splash",
        "splash-indivisible",
        "blocked",
        "blocked-indivisible",
    ],
)
def test_over_a_mesh_the_numbers_are_the_same(attend, kv_heads, rows):
    # 2 x 2 parts of rows, 2 of heads; what they do not divide is done everywhere, gradients once.
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    assert_equals_plain(
        functools.partial(attend, mesh=mesh), (4, kv_heads, 16), padded(72)[1 : 1 + rows], 9, None
    )


def layers_total(attend, remat):
    """Three layers in a scan, the second without a window."""

    def total(weight_LKK, x_BTHK, valid_BT):
        def layer(x_BTHK, leaves):
            weight_KK, flag = leaves
            q_BTHK, k_BTNK = x_BTHK @ weight_KK, x_BTHK[:, :, ::2]
            call = lambda window: (
                lambda: attend(
                    q_BTHK, k_BTNK, k_BTNK, valid_BT, window=window, scale=0.25, cap=None
                )
            )
            return x_BTHK + kernels.cond_on_window(flag, call(9), call(None)), None

        out_BTHK, _ = jax.lax.scan(
            remat(layer), x_BTHK, (weight_LKK, jnp.array([True, False, True]))
        )
        return jnp.sum(jnp.where(valid_BT[:, :, None, None], out_BTHK.astype(jnp.float32) ** 2, 0))

    return total


save_residuals = functools.partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(kernels.RESIDUALS),
)
REMAT = {
    "kept": lambda layer: layer,
    "recomputed": functools.partial(jax.checkpoint, prevent_cse=False),
    "named": save_residuals,
}


@pytest.mark.parametrize(
    ("attend", "remat"),
    [
        (cudnn, "recomputed"),
        pytest.param(splash, "kept", marks=pytest.mark.slow),
        pytest.param(splash, "recomputed", marks=pytest.mark.slow),
        pytest.param(splash, "named", marks=pytest.mark.slow),
    ],
    ids=["cudnn", "splash-kept", "splash-recomputed", "splash-named"],
)
def test_in_a_scan_a_flag_chooses_the_window(attend, remat):
    x_BTHK = draw(5, 24, 4, 2, 16)[0]
    weight_LKK = np.random.default_rng(1).standard_normal((3, 16, 16)).astype(np.float32) / 4
    gradients = lambda total: jax.jit(jax.grad(total, argnums=(0, 1)))(
        weight_LKK, x_BTHK, padded(24)
    )
    expected = gradients(layers_total(plain, REMAT["kept"]))
    for got, want in zip(gradients(layers_total(attend, REMAT[remat])), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_the_platform_chooses():
    config = functools.partial(
        ModelConfig,
        vocab_size=8,
        width=8,
        ffn_width=8,
        layers=1,
        heads=2,
        kv_heads=1,
        dtype="bfloat16",
    )
    usual = config(head_dim=128)
    assert (
        kernels.choose_attention(
            "tpu", config(head_dim=20, dtype="float32", attention_cap=50.0)
        ).path
        == "splash"
    )
    assert [
        kernels.choose_attention(
            "cpu", config(head_dim=20, attention_cap=50.0), devices=devices
        ).path
        for devices in (1, 8)
    ] == ["blocked", "plain"]
    found = {
        capability: kernels.choose_attention("gpu", usual, capability).path
        for capability in (None, "7.5", "8.0", "9.0", "12.1", "gfx942")
    }
    assert found == {
        None: "cudnn",
        "7.5": "blocked",
        "8.0": "cudnn",
        "9.0": "cudnn",
        "12.1": "cudnn",
        "gfx942": "blocked",
    }
    assert [
        kernels.choose_attention("cuda", config(head_dim=256), capability).path
        for capability in ("8.9", "9.0", "10.0")
    ] == ["blocked", "cudnn", "blocked"]


def test_why_a_gpus_kernel_is_not_taken_is_said():
    config = functools.partial(
        ModelConfig, vocab_size=8, width=8, ffn_width=8, layers=1, heads=2, kv_heads=1
    )
    unfit = {
        "head size that is a multiple of 8 and at most 256, and it is 20": {"head_dim": 20},
        "at most 256, and it is 264": {"head_dim": 264},
        "no cap on logits, and the model caps them at 50": {"head_dim": 64, "attention_cap": 50.0},
        "needs bfloat16, and activations are float32": {"head_dim": 64, "dtype": "float32"},
    }
    for words, fields in unfit.items():
        path, why = kernels.choose_attention(
            "gpu", config(**{"dtype": "bfloat16", **fields}), "9.0"
        )
        assert path == "blocked" and words in why
    assert (
        "compute capability 8.0 or more, and this device has 7.5"
        in kernels.choose_attention("gpu", config(head_dim=64), "7.5").why
    )


def abstract(mesh, batch, length, heads, kv_heads, head_dim, dtype=jnp.bfloat16):
    """q, k, v and valid, over the mesh where one is given."""
    place = lambda *spec: None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
    array = lambda n: jax.ShapeDtypeStruct(
        (batch, length, n, head_dim), dtype, sharding=place(sharding.BATCH_AXES, None, "tensor")
    )
    valid_BT = jax.ShapeDtypeStruct((batch, length), jnp.bool_, sharding=place(sharding.BATCH_AXES))
    return array(heads), array(kv_heads), array(kv_heads), valid_BT


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("parts", [None, 2], ids=["one-device", "mesh"])
def test_cudnn_is_called_with_a_causal_mask_and_no_bias(monkeypatch, parts, window):
    # Lowered for a GPU without one. What JAX asks of the machine is answered: the version of cuDNN.
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(fused, "check_cudnn_version"):
        pytest.skip("this version of JAX asks for cuDNN's version elsewhere")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91002)
    mesh = None if parts is None else sharding.make_mesh(sharding.MeshConfig(tensor=parts))
    attend = functools.partial(kernels.cudnn, window=window, scale=0.125, cap=None, mesh=mesh)
    total = lambda q, k, v, valid: jnp.sum(attend(q, k, v, valid).astype(jnp.float32))
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*abstract(mesh, 8, 72, 4, 2, 64))
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    calls = Counter(re.findall(r"custom_call @(__cudnn\$\w+)", text))
    assert calls == {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
    assert set(re.findall(r'"mask_type": "(\w+)"', text)) == {"CAUSAL"}
    assert set(re.findall(r'"sliding_window_length": (\d+)', text)) == {str(window or 0)}
    assert "stablehlo.scatter" not in text and "all_reduce" not in text


@pytest.fixture(scope="module")
def tpu_devices():
    """Devices of a v5e slice to compile for; nothing can run on them."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    # Asked of no metadata server, and by several test processes at once.
    settings = {
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    assert jax.default_backend() == "cpu"


def compiled_for_tpu(function, *arguments) -> str:
    return (
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile().as_text()
    )


def kernel_calls(text: str) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "tensor", "head_dim", "window", "cap", "backward"),
    [
        (1, 1, 64, None, None, 1),
        (1, 1, 256, 1000, 50.0, 2),
        (2, 2, 128, None, None, 1),
        (2, 2, 80, 512, None, 2),
    ],
)
def test_splash_compiles_for_tpus(tpu_devices, data, tensor, head_dim, window, cap, backward):
    mesh = sharding.make_mesh(
        sharding.MeshConfig(data=data, tensor=tensor), tpu_devices[: data * tensor]
    )
    attend = functools.partial(kernels.splash, window=window, scale=0.125, cap=cap, mesh=mesh)
    total = lambda q, k, v, valid: jnp.sum(attend(q, k, v, valid).astype(jnp.float32))
    text = compiled_for_tpu(
        jax.grad(total, argnums=(0, 1, 2)), *abstract(mesh, 4, 1100, 8, 4, head_dim)
    )
    assert kernel_calls(text) == 1 + backward
    # Each device has its own rows and heads: nothing is sent.
    assert not re.search(r"all-(reduce|gather|to-all)|collective-permute", text)


@pytest.mark.slow
def test_splash_in_float32_compiles_for_tpus(tpu_devices):
    # Products of the highest precision inside the kernel, in both directions.
    mesh = sharding.make_mesh(sharding.MeshConfig(), tpu_devices[:1])
    attend = functools.partial(kernels.splash, window=None, scale=0.125, cap=50.0, mesh=mesh)
    total = lambda q, k, v, valid: jnp.sum(attend(q, k, v, valid))
    text = compiled_for_tpu(
        jax.grad(total, argnums=(0, 1, 2)), *abstract(mesh, 2, 700, 4, 2, 128, jnp.float32)
    )
    assert kernel_calls(text) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "calls"), [("kept", 5), ("recomputed", 7), ("named", 5)])
def test_named_residuals_spare_the_second_forward_kernel(tpu_devices, remat, calls):
    # In a layer of either kind: forward twice (windowed, full), backward 2 with a window and 1
    # without.
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), tpu_devices[:4])
    total = layers_total(functools.partial(kernels.splash, mesh=mesh), REMAT[remat])
    weight_LKK = jax.ShapeDtypeStruct((3, 64, 64), jnp.bfloat16, sharding=sharding.replicated(mesh))
    x_BTHK, *_, valid_BT = abstract(mesh, 4, 1024, 8, 4, 64)
    assert kernel_calls(compiled_for_tpu(jax.grad(total), weight_LKK, x_BTHK, valid_BT)) == calls
