"""Updates: accumulation, padding, gradients against finite differences and a slow reference in
numpy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.models import microbatches as microbatches_lib
from perl_jax.models import passes
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives import policy_gradient, preference, supervised
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.objectives.losses import LossSum
from perl_jax.objectives.policy_gradient import Experience
from perl_jax.runtime import trees
from perl_jax.training import step
from perl_jax.training.optimizers import OptimizerConfig, make_optimizer
from perl_jax.training.state import init_state
from perl_jax.types import Labelled, Pairs, Tokens, Tree
from tests import small

LM = small.changed(layers=2)
BASE = small.make_base(LM)
LORA = LoRAConfig(rank=5, alpha=10.0, targets="q,o,down")
POLICY = small.make_adapter(LM, LORA, head=False)
SCORER = small.make_adapter(LM, LORA, seed=4)
TEMPERATURE = 0.7
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@contextlib.contextmanager
def double_precision() -> Iterator[LanguageModel]:
    """The same decoder with every float32 of the code a float64, so that rounding does not show."""
    config = dataclasses.replace(LM.config)
    object.__setattr__(config, "dtype", "float64")
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        yield LanguageModel(config)


def widened(tree: Tree) -> Tree:
    """Float leaves in float64."""
    widen = lambda x: (
        np.asarray(x, np.float64) if np.issubdtype(x.dtype, np.floating) else np.asarray(x)
    )
    return jax.tree.map(widen, jax.device_get(tree))


# Batches of 8 rows of uneven lengths, padded on every side; two have no response token.


def weights(rows: int = 8) -> np.ndarray:
    return np.where(np.arange(rows) == 2, 0.5, 1.0).astype(np.float32)


def pairs() -> Pairs:
    return Pairs(small.make_tokens(), small.make_tokens(small.ROWS[::-1], seed=5), weights())


def labelled() -> Labelled:
    return Labelled(small.make_tokens(), np.linspace(0, 1, 8, dtype=np.float32), weights())


def experience() -> Experience:
    noise = np.random.default_rng(6)
    tokens = small.make_tokens()
    old_logp_BT = -3 * noise.random(tokens.tokens_BT.shape, np.float32)
    return_B = noise.standard_normal(8, np.float32)
    return Experience(
        tokens,
        old_logp_BT,
        target_BT=np.where(tokens.response_BT, return_B[:, None], 0).astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective of (lm, roles, base, batch, key), its roles and its batch."""

    objective: Callable
    roles: dict[str, Adapter]
    batch: Any


def grouped(lm, *rest) -> tuple:
    """GRPO with the KL in the loss; some ratios are beyond their bounds."""
    return policy_gradient.policy_gradient_objective(
        lm, AlgorithmConfig("grpo"), TEMPERATURE, "k2", 99, *rest
    )


def group_experience() -> Experience:
    known, noise = experience(), np.random.default_rng(8)
    advantage_B = noise.standard_normal(8, np.float32)
    return Experience(
        known.sequences,
        known.old_logp_BT,
        np.where(known.sequences.response_BT, advantage_B[:, None], 0).astype(np.float32),
        reference_BT=known.old_logp_BT - 0.5,
        kl_weight_B=np.full(8, 0.3, np.float32),
    )


def reinforce(normalise: str) -> Callable:
    config = AlgorithmConfig("reinforce", normalise=normalise)
    return lambda lm, *rest: policy_gradient.policy_gradient_objective(
        lm, config, TEMPERATURE, "k3", 99, *rest
    )


CASES = {
    "sft": Case(supervised.sft_objective, {"policy": POLICY}, small.make_tokens()),
    "pairwise": Case(supervised.pairwise_objective, {"reward": SCORER}, pairs()),
    "pointwise": Case(supervised.pointwise_objective, {"reward": SCORER}, labelled()),
    "reinforce": Case(reinforce("sequence"), {"policy": POLICY, "value": SCORER}, experience()),
    "grpo": Case(grouped, {"policy": POLICY}, group_experience()),
    "reinforce by a length": Case(
        reinforce("constant"), {"policy": POLICY, "value": SCORER}, experience()
    ),
    "reinforce a token": Case(
        reinforce("token"), {"policy": POLICY, "value": SCORER}, experience()
    ),
}


@functools.cache
def gradients_program(name: str, microbatches: int) -> Callable:
    """Compiled once for every shape of the batch; used in double precision."""
    with double_precision() as lm:
        objective = functools.partial(CASES[name].objective, lm)
    return jax.jit(
        lambda roles, base, batch, key: small.update_gradients(
            objective, roles, base, batch, key, microbatches
        )
    )


def gradients(name: str, batch: Any, microbatches: int = 1) -> tuple:
    """(loss, logs, gradients) of an update of a case's roles, in float64."""
    with double_precision():
        run, roles, base = (
            gradients_program(name, microbatches),
            widened(CASES[name].roles),
            widened(BASE),
        )
        return jax.device_get(run(roles, base, widened(batch), jax.random.key(0)))


def assert_close(left: Tree, right: Tree, atol: float) -> None:
    """Every leaf, relative to the size of the largest: sums of large terms round like those
    terms.
    """
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (name, a), b in zip(trees.named_leaves(left).items(), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b)))), err_msg=name
        )


# The last ones differ from reinforce in their weight only, which the reference in numpy checks.
EACH = [*list(CASES)[:-2], slow("reinforce by a length"), slow("reinforce a token")]


# Accumulation.


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        ("sft", 4),
        ("pairwise", 2),
        ("reinforce", 4),
        ("grpo", 4),
        slow("pointwise", 4),
        slow("reinforce a token", 2),
        slow("sft", 2),
        slow("pairwise", 4),
        slow("pointwise", 2),
        slow("reinforce", 2),
        slow("reinforce a token", 4),
    ],
)
def test_microbatches_give_the_gradient_of_the_whole_batch(name, microbatches):
    whole = gradients(name, CASES[name].batch)
    assert trees.global_norm(whole[2]) > 0.01
    parts = gradients(name, CASES[name].batch, microbatches)
    assert jax.tree.leaves(parts)[0].dtype == np.float64
    assert_close(parts, whole, 1e-12)
    # Sums in another order differ in float64's last bits; rounded to float32 nothing is left of it.
    small.assert_same(*(jax.tree.map(np.float32, found[2]) for found in (parts, whole)))


def test_microbatches_have_uneven_shares():
    # What makes the test above one of weighting: their rows hold 7, 5, 3 and 3 response tokens.
    split = microbatches_lib.split_microbatches(small.make_tokens(), 4)
    assert split.response_BT.sum(axis=(1, 2)).tolist() == [7, 5, 3, 3]


def test_microbatches_take_every_nth_row():
    split = microbatches_lib.split_microbatches(
        {"x": np.arange(8), "y": np.arange(16).reshape(8, 2)}, 4
    )
    assert split["x"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert split["y"].tolist()[1] == [[2, 3], [10, 11]]
    with pytest.raises(ValueError, match="8 rows do not split into 3 microbatches"):
        microbatches_lib.split_microbatches({"x": np.arange(8)}, 3)


@functools.cache
def update_program(name: str, microbatches: int, rate: float) -> tuple:
    # An epsilon of 1 keeps Adam's update proportional to the gradient: rounding of a tiny gradient
    # is then not blown up to the size of the rate.
    config = OptimizerConfig(name="adamw", learning_rate=rate, epsilon=1.0)
    optimizers = {role: make_optimizer(config, 10) for role in CASES[name].roles}
    objective = functools.partial(CASES[name].objective, LM)
    return optimizers, jax.jit(
        functools.partial(step.train_step, objective, optimizers, microbatches)
    )


def update(name: str, batch: Any, microbatches: int = 1, rate: float = 0.01) -> tuple:
    """One whole training step in float32: the new state and its metrics."""
    optimizers, run = update_program(name, microbatches, rate)
    return jax.device_get(
        run(init_state(CASES[name].roles, optimizers, jax.random.key(0)), BASE, batch)
    )


@pytest.mark.parametrize("name", ["sft", slow("reinforce")])
def test_microbatches_in_float32(name):
    # Rounding of float32 sums, about 1e-7 of their largest term: 1e-6 of the largest number in a
    # leaf of the new roles, and more in norms of gradients, whose terms cancel.
    case = CASES[name]
    (whole, whole_metrics), (parts, metrics) = update(name, case.batch), update(name, case.batch, 4)
    assert_close(parts.roles, whole.roles, 1e-6)
    assert_close(metrics, whole_metrics, 2e-5)
    assert metrics["finite"] and whole_metrics["finite"] and parts.step == 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.roles, jax.device_get(case.roles))
    assert min(jax.tree.leaves(moved)) > 1e-6


# Padding.


@pytest.mark.parametrize("name", EACH)
def test_what_padding_holds_changes_nothing(name):
    case = CASES[name]
    is_tokens = lambda node: isinstance(node, Tokens)
    batch = jax.tree.map(
        lambda node: small.other_padding(node) if is_tokens(node) else node,
        case.batch,
        is_leaf=is_tokens,
    )
    if isinstance(batch, Experience):
        batch = batch.replace(
            old_logp_BT=np.where(batch.sequences.response_BT, batch.old_logp_BT, 1.0)
        )
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(case.batch), strict=True)
    ]
    assert any(changed)
    # Bit for bit: the program is the same, and masked terms are exactly 0.
    small.assert_same(gradients(name, batch), gradients(name, case.batch))


@pytest.mark.parametrize("name", EACH)
def test_filler_rows_change_nothing(name):
    case = CASES[name]

    def filled(leaf: np.ndarray) -> np.ndarray:
        # False, 0 weight and, for what is not a mask or a weight, any number.
        return np.concatenate([leaf, np.zeros_like(leaf[:4])])

    batch = jax.tree.map(filled, case.batch)
    if isinstance(batch, Experience):
        junk_B1 = np.where(np.arange(12) < 8, 0, 5.0).astype(np.float32)[:, None]
        numbers = {"target_BT": batch.target_BT, "advantage_BT": batch.advantage_BT}
        batch = batch.replace(
            **{name: value + junk_B1 for name, value in numbers.items() if value is not None}
        )
    assert_close(gradients(name, batch), gradients(name, case.batch), 1e-12)


# Gradients.


def directional(function: Callable[[Tree], Any], point: Tree, direction: Tree) -> float:
    """Central difference of a scalar function along a direction."""
    at = lambda h: float(function(jax.tree.map(lambda x, d: x + h * d, point, direction)))
    return (at(1e-5) - at(-1e-5)) / 2e-5


def check_leaves(
    function: Callable[[Tree], Any], point: Tree, gradient: Tree, without: tuple[str, ...] = ()
) -> None:
    """The gradient of every leaf along a random direction against a finite difference.

    without: leaves that have no gradient; all others must have one.
    """
    names = trees.named_leaves(point)
    assert len(names) >= 6
    for index, name in enumerate(names):
        noise = np.random.default_rng(index)
        direction = trees.map_named(
            lambda n, x: noise.standard_normal(x.shape) * (n == name), point
        )
        slope = sum(
            np.sum(g * d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        assert (abs(slope) > 1e-6) == (name not in without), name
        assert directional(function, point, direction) == pytest.approx(
            slope, rel=1e-6, abs=1e-8
        ), name


@pytest.mark.parametrize("name", ["sft", "pairwise", "pointwise"])
def test_gradient_is_the_finite_difference_of_the_mean_loss(name):
    # LoRA leaves of all three, and the head's of the rewards.
    case = CASES[name]
    (role,) = case.roles
    grads = gradients(name, case.batch)[2]
    with double_precision() as lm:
        base, batch, roles = widened(BASE), widened(case.batch), widened(case.roles)
        mean = jax.jit(
            lambda adapter: case.objective(lm, {role: adapter}, base, batch, None)[0].mean
        )
        # The bias cancels out of a difference of two scores.
        check_leaves(mean, roles[role], grads[role], ("head/bias",) if name == "pairwise" else ())


def test_reinforce_gradients_are_finite_differences_of_their_own_losses():
    # Of the policy: the policy loss with the advantages held. Of the value model: the value loss.
    case = CASES["reinforce"]
    # The ratio to the old policy is far above its bound, so that the weights of tokens stay put.
    case = dataclasses.replace(
        case, batch=case.batch.replace(old_logp_BT=case.batch.old_logp_BT - 15)
    )
    grads = gradients("reinforce", case.batch)[2]
    with double_precision() as lm:
        base, batch, roles = widened(BASE), widened(case.batch), widened(case.roles)
        logs = jax.jit(lambda roles: case.objective(lm, roles, base, batch, None)[1])
        for role in roles:
            mean = lambda adapter: logs(roles | {role: adapter})[f"{role}/loss"].mean
            check_leaves(mean, roles[role], grads[role])


def test_each_loss_reaches_its_own_role_only():
    case = CASES["reinforce"]

    @jax.jit
    def separate(roles):
        losses = lambda roles: [
            case.objective(LM, roles, BASE, case.batch, None)[1][name].total
            for name in ("policy/loss", "value/loss")
        ]
        _, pull = jax.vjp(losses, roles)
        return pull([1.0, 0.0])[0], pull([0.0, 1.0])[0], pull([1.0, 1.0])[0]

    of_policy, of_value, both = separate(case.roles)
    assert all(
        not np.any(leaf) for leaf in jax.tree.leaves((of_policy["value"], of_value["policy"]))
    )
    assert_close((of_policy["policy"], of_value["value"]), (both["policy"], both["value"]), 1e-6)
    assert trees.global_norm(both["policy"]) > 0.1 and trees.global_norm(both["value"]) > 0.1


# The REINFORCE objective against loops over rows and tokens.


def log_softmax(x_V: np.ndarray) -> np.ndarray:
    return x_V - x_V.max() - np.log(np.sum(np.exp(x_V - x_V.max())))


def reference(logits_BTV: np.ndarray, values_BT: np.ndarray, batch: Experience) -> dict[str, float]:
    """Totals of both losses and of the logs: what stands in column t - 1 is about token t."""
    names = (
        "policy",
        "value",
        "entropy",
        "ratio",
        "deviation",
        "clipped",
        "advantage",
        "advantage2",
        "return",
        "return2",
        "error",
        "error2",
        "tokens",
    )
    sums = dict.fromkeys(names, 0.0)
    rows = 0
    for b, return_B in enumerate(
        np.asarray(batch.target_BT).max(axis=1) + np.asarray(batch.target_BT).min(axis=1)
    ):
        columns = np.flatnonzero(batch.sequences.response_BT[b])
        rows += len(columns) > 0
        for t in columns:
            logp_V = log_softmax(logits_BTV[b, t - 1] / TEMPERATURE)
            logp = logp_V[batch.sequences.tokens_BT[b, t]]
            advantage = return_B - values_BT[b, t - 1]
            ratio = np.exp(logp - batch.old_logp_BT[b, t])
            sums["policy"] -= logp * advantage * min(ratio, 2.0)
            sums["value"] += advantage**2
            sums["entropy"] -= np.sum(np.exp(logp_V) * logp_V)
            sums["ratio"] += ratio
            sums["deviation"] += abs(ratio - 1)
            sums["clipped"] += ratio > 2
            sums["advantage"] += advantage
            sums["advantage2"] += advantage**2
            sums["error"] += advantage
            sums["error2"] += advantage**2
            sums["return"] += return_B
            sums["return2"] += return_B**2
            sums["tokens"] += 1
    return sums | {"sequences": float(rows)}


@pytest.mark.parametrize("normalise", ["sequence", "token"])
def test_reinforce_objective_equals_loops_in_numpy(normalise):
    with double_precision() as lm:
        batch, base, roles = widened(experience()), widened(BASE), widened(CASES["reinforce"].roles)
        tokens = (batch.sequences.tokens_BT, batch.sequences.valid_BT)
        logits_BTV = np.asarray(jax.jit(lm.logits)(base, roles["policy"], *tokens))
        values_BT = np.asarray(jax.jit(lm.values)(base, roles["value"], *tokens))
        loss, logs = jax.jit(reinforce(normalise), static_argnums=0)(lm, roles, base, batch, None)
    expected = reference(logits_BTV, values_BT, batch)
    weight = expected["sequences" if normalise == "sequence" else "tokens"]
    # 18 response tokens in 6 rows: the other two have none.
    assert (expected["tokens"], expected["sequences"]) == (18, 6)
    totals = {
        "policy/loss": ("policy", weight),
        "value/loss": ("value", weight),
        "response/entropy": ("entropy", 18),
        "policy/ratio": ("ratio", 18),
        "policy/ratio_deviation": ("deviation", 18),
        "policy/clip_fraction": ("clipped", 18),
        "advantage/mean": ("advantage", 18),
        "advantage/square": ("advantage2", 18),
        "value/error/mean": ("error", 18),
        "value/error/square": ("error2", 18),
        "return/mean": ("return", 18),
        "return/square": ("return2", 18),
    }
    assert set(logs) == set(totals)
    for name, (key, divisor) in totals.items():
        assert float(logs[name].total) == pytest.approx(expected[key], rel=1e-10), name
        assert float(logs[name].weight) == divisor, name
    assert float(loss.total) == pytest.approx(expected["policy"] + expected["value"], rel=1e-10)
    assert float(loss.weight) == weight


# Finiteness.


def test_nan_in_a_batch_is_seen():
    fourth_B = np.arange(8) == 3
    assert update("pointwise", labelled())[1]["finite"]
    label_B = np.where(fourth_B, np.nan, labelled().label_B)
    assert not update("pointwise", labelled().replace(label_B=label_B))[1]["finite"]
    # On a row of weight 0 it is not part of anything.
    ignored = labelled().replace(
        label_B=label_B, weight_B=np.where(fourth_B, 0, 1).astype(np.float32)
    )
    assert update("pointwise", ignored)[1]["finite"]


def test_an_update_out_of_range_is_seen():
    # Loss and gradient are finite; it is the weights that the update leaves behind that are not.
    objective = lambda roles, frozen, batch, key: (
        LossSum(-roles["policy"].head["bias"], jnp.float32(1)),
        {},
    )
    optimizers = {"policy": optax.sgd(1e38)}
    for start, finite in ((2e38, True), (3e38, False)):
        state = init_state(
            {"policy": Adapter(head={"bias": jnp.float32(start)})}, optimizers, jax.random.key(0)
        )
        assert (
            bool(step.train_step(objective, optimizers, 1, state, None, {})[1]["finite"]) == finite
        )


def test_a_tie_is_half_in_order():
    np.testing.assert_array_equal(
        supervised.in_order(jnp.array([2.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 2.0])), [1, 0.5, 0]
    )
    # Every other pair is two times the same response, whatever its padding holds: those count in no
    # accuracy.
    chosen, other = small.make_tokens(), small.make_tokens(seed=5)
    equal_B1 = np.arange(len(chosen.tokens_BT))[:, None] % 2 == 0
    rejected = other.replace(
        tokens_BT=np.where(equal_B1 & chosen.valid_BT, chosen.tokens_BT, other.tokens_BT)
    )
    pairs = Pairs(chosen, rejected, np.arange(1, len(equal_B1) + 1, dtype=np.float32))
    _, logs = jax.jit(functools.partial(supervised.pairwise_objective, LM))(
        {"reward": SCORER}, BASE, pairs, None
    )
    right_B = np.asarray(small.score(LM, BASE, SCORER, chosen)) > np.asarray(
        small.score(LM, BASE, SCORER, rejected)
    )
    assert float(logs["train/accuracy"].weight) == pairs.weight_B[1::2].sum()
    assert float(logs["train/accuracy"].total) == pairs.weight_B[1::2][right_B[1::2]].sum()


def test_sft_learns_response_tokens_alone():
    # Six real tokens, of which three are the response's: (2 + 3 + 5) / 3.
    tokens = Tokens(
        np.zeros((2, 4), np.int32),
        np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool),
        np.array([[0, 0, 1, 1], [0, 1, 0, 0]], bool),
    )
    lm = types.SimpleNamespace(
        logprobs=lambda *_, **__: (-jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 7.0, 7.0]]), None)
    )
    loss, _ = supervised.sft_objective(lm, {"policy": None}, None, tokens, None)
    assert (float(loss.total), float(loss.weight)) == (10.0, 3.0)


def test_log_ratios_and_their_means_by_hand():
    mask_BT = np.array([[0, 1, 1, 0], [0, 1, 0, 0]], bool)
    logp_BT, reference_BT = (
        np.full((2, 4), -1.0),
        np.array([[9.0, -2.0, -4.0, 9.0], [9.0, -0.5, 9.0, 9.0]]),
    )
    np.testing.assert_allclose(
        preference.response_log_ratio(logp_BT, reference_BT, mask_BT), [4.0, -0.5]
    )
    np.testing.assert_allclose(
        preference.response_log_ratio(logp_BT, reference_BT, mask_BT, mean=True), [2.0, -0.5]
    )


def test_sides_come_back_as_they_went_in():
    chosen_B, rejected_B = np.arange(3.0), 10 + np.arange(3.0)
    np.testing.assert_array_equal(
        passes.split_pairs(passes.interleave(chosen_B, rejected_B)), [chosen_B, rejected_B]
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_microbatch_has_a_key_of_its_own(microbatches):
    objective = lambda roles, frozen, part, key: (
        LossSum(roles["policy"].lora["x"] * jax.random.uniform(key), jnp.float32(1)),
        {},
    )
    key = jax.random.key(3)
    _, _, grads = small.update_gradients(
        objective,
        {"policy": Adapter(lora={"x": jnp.float32(1.0)})},
        None,
        np.zeros((4, 2)),
        key,
        microbatches,
    )
    drawn = [
        jax.random.uniform(k)
        for k in (jax.random.split(key, microbatches) if microbatches > 1 else [key])
    ]
    np.testing.assert_allclose(grads["policy"].lora["x"], np.mean(drawn), rtol=1e-6)
