"""Jobs that train a fresh adapter on top of a frozen one."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from perl_jax.adapters import combine
from perl_jax.adapters.lora import LoRAConfig
from perl_jax.errors import UserError
from perl_jax.hub.artefacts import read_record
from perl_jax.hub.show import ShowConfig, show
from perl_jax.runtime import trees
from perl_jax.training import commands
from tests import small
from tests.training import tiny

TOP = LoRAConfig(rank=3, alpha=6.0, targets="q,down")


def merged(model, adapter) -> dict:
    return trees.named_leaves(combine.merge(model.base, adapter))


@pytest.mark.slow
def test_sft_reward_and_rl_on_top_of_a_policy(jobs, tmp_path):
    fields = {"lora": TOP, "stack_on": str(jobs.policy)}
    model = tiny.open_model(jobs.base)
    below, _ = model.load_role(jobs.policy)
    sft = commands.run_sft(tiny.sft_config(tmp_path / "sft", jobs.base, **fields))
    reward = commands.run_reward(tiny.reward_config(tmp_path / "reward", jobs.base, **fields))
    tuned = commands.run_rl(tiny.rl_config(tmp_path / "rl", jobs.base, None, reward, **fields))
    for folder in (sft, reward, tuned):
        adapter, record = model.load_role(folder)
        assert record.under == dict.fromkeys(("q", "k", "v", "o"), 5) and record.lora == TOP
        small.assert_same(
            jax.device_get(adapter.under), jax.device_get(combine.frozen_pairs(below, 2))
        )
        # The top has moved, and what is served is the sum.
        assert np.abs(adapter.lora["layers"]["attention"]["q"]["lora_b"]).max() > 0
        alone = merged(model, adapter.replace(under=None))
        for name, leaf in merged(model, adapter).items():
            np.testing.assert_allclose(
                leaf - alone[name],
                merged(model, below)[name] - trees.named_leaves(model.base)[name],
                atol=1e-5,
                err_msg=name,
            )
    # RL is anchored to what lies beneath, where the fresh adapter starts.
    assert tiny.rows(tmp_path / "rl")[0]["kl/sequence"] == 0.0
    cost = tiny.read(tmp_path / "sft" / "cost.json")
    assert cost["parameters_trainable"] == trees.count(model.lm.abstract_lora(TOP))
    assert re.search("frozen beneath .*q rank 5", show(ShowConfig(str(sft))))
    assert read_record(sft).base_fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tuning": "full"}, "stack_on needs tuning lora"),
        ({"lora": LoRAConfig(rank=2, dora=True)}, "A DoRA adapter cannot go on top of another"),
    ],
)
def test_stacks_that_cannot_be(jobs, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        commands.run_sft(
            tiny.sft_config(tmp_path / "sft", jobs.base, stack_on=str(jobs.policy), **fields)
        )


def test_rl_trains_on_an_adapter_or_on_top_of_it(jobs, tmp_path):
    with pytest.raises(UserError, match=r"Give policy .* or stack_on .*, not both"):
        tiny.rl_config(
            tmp_path / "rl", jobs.base, jobs.policy, jobs.reward, stack_on=str(jobs.policy)
        )
