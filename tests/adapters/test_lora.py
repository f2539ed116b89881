"""Adapters: equal to the base at first, right afterwards, and the only thing that is ever
trained.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perl_jax.adapters import combine, initial_values
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError
from perl_jax.models.linear import AdapterSpec, Linear
from perl_jax.objectives import supervised
from perl_jax.runtime import trees
from perl_jax.runtime.programs import Program
from perl_jax.training import step as step_lib
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import init_state
from tests import small

BASE = small.make_base()
TARGETS = ("attention", "all-linear", "q,v", "o,down")
TORCH_NAMES = {"attention": "self_attn", "mlp": "mlp"}


# Configuration.


@pytest.mark.parametrize(
    ("targets", "projections"),
    [
        ("attention", ("q", "k", "v", "o")),
        ("all-linear", ("q", "k", "v", "o", "gate", "up", "down")),
        ("q", ("q",)),
        ("q, v", ("q", "v")),
        ("gate,up,down", ("gate", "up", "down")),
    ],
)
def test_targets_name_projections(targets, projections):
    config = LoRAConfig(rank=2, targets=targets)
    assert config.projections == projections
    leaves = trees.named_leaves(small.LM.abstract_lora(config))
    assert {name.split("/")[-2] for name in leaves} == set(projections)
    assert len(leaves) == 2 * len(projections)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": "q,z"},
            "lora.targets is 'q,z'; it must be attention, all-linear, or names out of q, k, v, o, "
            "gate, up, down",
        ),
        ({"targets": ""}, "lora.targets is ''"),
        ({"targets": "q,,v"}, "lora.targets is 'q,,v'"),
        ({"targets": "attention,up"}, "lora.targets is 'attention,up'"),
        ({"rank": 0}, "lora.rank is 0"),
        ({"rank": 2.5}, "lora.rank is 2.5; it must be a whole number"),
        ({"alpha": -1.0}, "lora.alpha is -1.0"),
        ({"alpha": float("nan")}, "lora.alpha is nan"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"dtype": "bfloat16"}, "lora.dtype is 'bfloat16'; it must be one of float32"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(UserError) as error:
        LoRAConfig(**fields)
    assert message in str(error.value)


def test_scale_is_alpha_over_rank():
    assert LoRAConfig(rank=4, alpha=10.0).scale_of("q") == 2.5


# Initial values.


def test_a_is_uniform_and_b_is_zero():
    config = LoRAConfig(rank=64, targets="all-linear")
    adapter = small.LM.init_adapter(jax.random.key(0), config)
    assert adapter.head is None and adapter.weights is None and adapter.config == config
    for name, leaf in trees.named_leaves(adapter.lora).items():
        assert leaf.dtype == jnp.float32
        if name.endswith("lora_b"):
            np.testing.assert_array_equal(leaf, 0)
            continue
        # Uniform in +-1/sqrt(in): standard deviation 1/sqrt(3 in), all of the range used.
        bound = 1 / np.sqrt(leaf.shape[1])
        assert 0.99 * bound < np.abs(leaf).max() <= bound
        np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.05)
        assert np.abs(leaf[0] - leaf[1]).max() > bound / 2


def test_keys_decide_the_draws_and_targets_do_not_disturb_each_other():
    draw = lambda seed, targets: trees.named_leaves(
        small.LM.init_adapter(jax.random.key(seed), LoRAConfig(rank=3, targets=targets)).lora
    )
    few, many, other = draw(0, "q,v"), draw(0, "all-linear"), draw(1, "q,v")
    for name, leaf in few.items():
        np.testing.assert_array_equal(leaf, many[name])
        assert name.endswith("lora_b") or np.abs(leaf - other[name]).max() > 0.05
    # No two projections of one input width share a draw.
    drawn = {name: np.array(leaf) for name, leaf in many.items() if name.endswith("lora_a")}
    for (name, a), (name2, b) in itertools.combinations(drawn.items(), 2):
        assert a.shape != b.shape or np.abs(a - b).max() > 0.05, (name, name2)


def test_head_is_normal_or_zero():
    head = initial_values.init_head(jax.random.key(0), 40_000)
    np.testing.assert_allclose(np.std(head["kernel"]) * np.sqrt(40_001), 1, rtol=0.02)
    assert head["bias"] == 0 and head["bias"].shape == ()
    np.testing.assert_array_equal(
        initial_values.init_head(None, 7)["kernel"], np.zeros(7, np.float32)
    )


# At step 0.


@pytest.mark.parametrize("targets", TARGETS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(targets):
    tokens = small.make_tokens()
    adapter = small.LM.init_adapter(jax.random.key(3), LoRAConfig(rank=5, targets=targets))
    small.assert_same(
        small.logits(small.LM, BASE, adapter, tokens), small.logits(small.LM, BASE, None, tokens)
    )
    moved = small.make_adapter(lora=adapter.config)
    assert (
        np.abs(
            small.logits(small.LM, BASE, moved, tokens)
            - small.logits(small.LM, BASE, adapter, tokens)
        ).max()
        > 0.05
    )


def test_a_fresh_adapter_is_the_base_bit_for_bit_without_jit():
    tokens = small.make_tokens()
    adapter = small.LM.init_adapter(jax.random.key(3), small.LORA)
    with jax.disable_jit():
        fresh_BTV, base_BTV = (
            small.LM.logits(BASE, role, tokens.tokens_BT, tokens.valid_BT)
            for role in (adapter, None)
        )
    small.assert_same(fresh_BTV, base_BTV)


@pytest.mark.parametrize("loss", [small.sft_loss, small.pair_loss])
def test_first_gradient_reaches_b_and_the_head(loss):
    adapter = small.LM.init_adapter(jax.random.key(3), small.LORA).replace(head=small.make_head())
    _, grads = small.gradient(loss, small.LM, adapter, BASE, small.make_tokens())
    for name, leaf_LXX in trees.named_leaves(grads.lora).items():
        largest_L = np.abs(leaf_LXX).max(axis=(1, 2))
        # B = 0, so nothing flows back to A yet; every layer's B moves.
        assert (largest_L > 1e-6).all() if name.endswith("lora_b") else (largest_L == 0).all(), name
    assert (np.abs(grads.head["kernel"]).max() > 1e-4) == (loss is small.pair_loss)


# Against torch.


def torch_adapted(model, adapter: Adapter):
    """Torch parameters W + (alpha / R) (A B)^T made of leaves that ask for gradients, and those
    leaves.
    """
    torch = pytest.importorskip("torch")
    leaves = {
        name: torch.tensor(np.array(leaf), requires_grad=True)
        for name, leaf in trees.named_leaves(adapter.lora).items()
    }
    parameters = dict(model.named_parameters())
    for stem in sorted(name.removesuffix("/lora_a") for name in leaves if name.endswith("lora_a")):
        _, part, projection = stem.split("/")
        delta_LDF = (
            adapter.config.scale_of("q") * leaves[f"{stem}/lora_a"] @ leaves[f"{stem}/lora_b"]
        )
        for index, delta_DF in enumerate(delta_LDF):
            name = f"model.layers.{index}.{TORCH_NAMES[part]}.{projection}_proj.weight"
            parameters[name] = parameters[name] + delta_DF.T
    return parameters, leaves


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory):
    return small.write_twin(tmp_path_factory.mktemp("twin"), small.LM, BASE)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_logits_and_gradients_equal_a_lora_written_in_torch(twin, targets):
    torch = pytest.importorskip("torch")
    adapter, tokens = (
        small.make_adapter(lora=LoRAConfig(rank=5, alpha=10.0, targets=targets)),
        small.make_tokens(),
    )
    parameters, leaves = torch_adapted(twin, adapter)
    logits_BTV = torch.func.functional_call(
        twin, parameters, kwargs=small.torch_inputs(tokens)
    ).logits
    small.torch_sft_loss(logits_BTV, tokens).backward()
    mine_BTV = np.array(small.logits(small.LM, BASE, adapter, tokens))
    np.testing.assert_allclose(
        mine_BTV[tokens.valid_BT], logits_BTV.detach().numpy()[tokens.valid_BT], atol=1e-4
    )
    for name, grad in trees.named_leaves(
        small.gradient(small.sft_loss, small.LM, adapter, BASE, tokens)[1].lora
    ).items():
        assert np.abs(grad).max() > 1e-3, name
        np.testing.assert_allclose(
            grad, leaves[name].grad.numpy(), atol=1e-4, rtol=1e-4, err_msg=name
        )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_logits_and_gradients_equal_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    adapter, tokens = small.make_adapter(), small.make_tokens()
    names = [f"{name}_proj" for name in small.LORA.projections]
    settings = peft.LoraConfig(
        r=5,
        lora_alpha=10,
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(small.write_twin(tmp_path, small.LM, BASE), settings)
    parameters, places = dict(model.named_parameters()), {}
    for name, leaf in trees.named_leaves(adapter.lora).items():
        _, part, projection, kind = name.split("/")
        for index in range(small.CONFIG.layers):
            matrix = {"lora_a": "lora_A", "lora_b": "lora_B"}[kind]
            layer = f"base_model.model.model.layers.{index}.{TORCH_NAMES[part]}"
            place = f"{layer}.{projection}_proj.{matrix}.default.weight"
            places[name, index] = parameters[place]
            with torch.no_grad():
                parameters[place].copy_(torch.tensor(np.array(leaf[index]).T))
    logits_BTV = model(**small.torch_inputs(tokens)).logits
    small.torch_sft_loss(logits_BTV, tokens).backward()
    mine_BTV = np.array(small.logits(small.LM, BASE, adapter, tokens))
    np.testing.assert_allclose(
        mine_BTV[tokens.valid_BT], logits_BTV.detach().numpy()[tokens.valid_BT], atol=1e-4
    )
    grads = trees.named_leaves(
        small.gradient(small.sft_loss, small.LM, adapter, BASE, tokens)[1].lora
    )
    for (name, index), parameter in places.items():
        np.testing.assert_allclose(
            grads[name][index], parameter.grad.numpy().T, atol=1e-4, rtol=1e-4, err_msg=name
        )


# Merging.


@pytest.mark.parametrize("targets", TARGETS)
def test_merged_equals_applied(targets):
    adapter, tokens = (
        small.make_adapter(lora=LoRAConfig(rank=3, targets=targets)),
        small.make_tokens(),
    )
    before = jax.tree.map(np.array, (BASE, adapter))
    merged = combine.merge(BASE, adapter)
    applied_BTV, merged_BTV = (
        small.logits(small.LM, *pair, tokens) for pair in ((BASE, adapter), (merged, None))
    )
    np.testing.assert_allclose(applied_BTV, merged_BTV, atol=5e-5)
    assert np.abs(applied_BTV - small.logits(small.LM, BASE, None, tokens)).max() > 0.05
    small.assert_same(jax.tree.map(np.array, (BASE, adapter)), before)


def test_merging_by_hand_in_bfloat16():
    adapter = small.make_adapter(lora=LoRAConfig(rank=2, alpha=6.0, targets="k"))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    merged = trees.named_leaves(combine.merge(low, adapter))
    for name, leaf in trees.named_leaves(low).items():
        expected = leaf
        if name == "layers/attention/k/kernel":
            a_LDR, b_LRF = (
                np.array(adapter.lora["layers"]["attention"]["k"][part])
                for part in ("lora_a", "lora_b")
            )
            expected = (np.array(leaf, np.float32) + 3.0 * np.matmul(a_LDR, b_LRF)).astype(
                jnp.bfloat16
            )
            assert (np.array(leaf) != np.array(expected)).mean() > 0.9
        assert merged[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.array(merged[name], np.float32), np.array(expected, np.float32), rtol=0.008
        )


def test_merging_nothing_or_everything():
    full = small.make_full(BASE)
    assert combine.merge(BASE, Adapter(head=small.make_head())) is BASE
    assert combine.merge(BASE, full) is full.weights


# The base stays what and where it is.


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_training_leaves_the_base_alone(name):
    tokens = small.make_tokens()
    base = jax.tree.map(jnp.copy, BASE)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(base)]
    optimizers = {"policy": make_optimizer(OptimizerConfig(name=name, learning_rate=0.01), 10)}
    roles = {"policy": small.LM.init_adapter(jax.random.key(0), small.LORA)}
    state = first = init_state(roles, optimizers, jax.random.key(1))
    objective = functools.partial(supervised.sft_objective, small.LM)
    step = Program(
        "sft", functools.partial(step_lib.train_step, objective, optimizers, 1), donate=(0,)
    )
    losses = []
    for _ in range(5):
        state, metrics = step(state, base, tokens)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 0.05 and bool(metrics["finite"]) and int(state.step) == 5
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(base)] == pointers
    small.assert_same(base, BASE)
    # The state's own buffers were given up; the role the state was made from was copied first.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.roles))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(roles))


def equations(jaxpr) -> Iterator:
    """Every equation, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def weight_gradients(loss, role, base, tokens) -> set[tuple[int, ...]]:
    """Shapes of base weights (whole, or one layer) that the gradient computes by products or
    sums.
    """
    jaxpr = jax.make_jaxpr(lambda role, base: jax.grad(loss)(role, base, tokens))(role, base)
    shapes = {leaf.shape for leaf in jax.tree.leaves(base) if leaf.ndim > 1}
    shapes |= {shape[1:] for shape in shapes if shape[0] == small.CONFIG.layers and len(shape) == 3}
    shapes |= {shape[:-2] + shape[:-3:-1] for shape in shapes}
    found, makers = (
        set(),
        {"dot_general", "scatter-add", "add_any", "add", "mul", "broadcast_in_dim", "reduce_sum"},
    )
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in makers:
            found |= {variable.aval.shape for variable in equation.outvars} & shapes
    return found | ({variable.aval.shape for variable in jaxpr.jaxpr.outvars} & shapes)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("loss", [small.sft_loss, small.pair_loss])
def test_no_gradient_of_a_base_weight_is_computed(loss, remat):
    # Six rows of 9 tokens: no product of activations has the shape of a weight by accident.
    tokens = small.make_tokens((("left", 9), ("left", 6), ("right", 8)) * 2, 9)
    function = functools.partial(loss, small.changed(remat=remat))
    adapter = small.make_adapter()
    assert weight_gradients(function, adapter, BASE, tokens) == set()
    # The same search finds the gradient of every weight when all of them are trained.
    full = small.make_full(BASE)
    matrices = {leaf.shape for leaf in jax.tree.leaves(BASE) if leaf.ndim > 1}
    assert matrices <= weight_gradients(function, full, BASE, tokens)


# Dropout.


def test_dropout_acts_only_where_a_key_is_given():
    tokens = small.make_tokens()
    plain = small.make_adapter()
    dropped = plain.replace(
        config=LoRAConfig(rank=5, alpha=10.0, targets="all-linear", dropout=0.4)
    )
    logits = jax.jit(small.LM.logits)
    args = tokens.tokens_BT, tokens.valid_BT
    one, two = jax.random.key(1), jax.random.key(2)
    exact_BTV, first_BTV = (
        small.logits(small.LM, BASE, plain, tokens),
        logits(BASE, dropped, *args, one),
    )
    small.assert_same(small.logits(small.LM, BASE, dropped, tokens), exact_BTV)
    small.assert_same(logits(BASE, dropped, *args, one), first_BTV)
    np.testing.assert_allclose(logits(BASE, plain, *args, one), exact_BTV, atol=1e-5)
    assert np.abs(logits(BASE, dropped, *args, two) - first_BTV).max() > 0.01
    assert np.abs(exact_BTV - first_BTV).max() > 0.01


def test_every_projection_drops_its_own_inputs():
    # Equal weights, equal inputs, one key: only the projection's name tells them apart.
    lora = LoRAConfig(rank=5, targets="all-linear", dropout=0.5)
    noise = np.random.default_rng(0)
    a_DR, b_RF, x_BTD = (
        noise.standard_normal(shape).astype(np.float32) for shape in ((32, 5), (5, 24), (1, 2, 32))
    )
    outputs = []
    for name in lora.projections:
        linear = Linear(
            name, small.CONFIG, AdapterSpec(lora), (32, 24), ("embed", "heads"), nnx.Rngs(0)
        )
        linear.lora_a[...], linear.lora_b[...] = a_DR, b_RF
        outputs.append(np.array(linear(x_BTD, jax.random.key(1))))
    for one, other in itertools.combinations(outputs, 2):
        assert np.abs(one - other).max() > 0.5


def test_every_layer_drops_its_own_inputs():
    # Layers that are alike and add nothing to the residual stream, save for one layer's adapter:
    # without dropout it does not matter which layer has it, with one mask for all it would not.
    base = trees.map_named(
        lambda name, leaf: leaf * (not name.endswith(("o/kernel", "down/kernel"))), BASE
    )
    base["layers"] = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), base["layers"]
    )
    down = small.make_adapter(lora=LoRAConfig(rank=5, targets="down")).lora["layers"]["mlp"]["down"]
    tokens, hidden = small.make_tokens((("none", 5),), 5), jax.jit(small.LM.hidden)
    effects = {0.0: [], 0.5: []}
    for dropout, index in itertools.product(effects, range(3)):
        only = {
            "lora_a": jnp.stack([down["lora_a"][0]] * 3),
            "lora_b": jnp.zeros_like(down["lora_b"]).at[index].set(down["lora_b"][0]),
        }
        role = Adapter(
            lora={"layers": {"mlp": {"down": only}}},
            config=LoRAConfig(rank=5, targets="down", dropout=dropout),
        )
        effects[dropout].append(
            np.array(hidden(base, role, tokens.tokens_BT, tokens.valid_BT, jax.random.key(0)))
        )
    for one, other in itertools.combinations(effects[0.0], 2):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for one, other in itertools.combinations(effects[0.5], 2):
        assert np.abs(one - other).max() > 0.01
