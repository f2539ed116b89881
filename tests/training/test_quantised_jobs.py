"""Every job over a base in 8 bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from perl_jax.adapters.lora import LoRAConfig
from perl_jax.adapters.quantise import QuantiseConfig, is_quantised
from perl_jax.errors import UserError
from perl_jax.generation.text import GenerateConfig, run_generate
from perl_jax.hub.artefacts import read_record
from perl_jax.hub.export import ExportConfig, run_export
from perl_jax.hub.model import ModelOptions, load_model
from perl_jax.hub.show import ShowConfig, show
from perl_jax.training import commands
from tests.training import tiny

LOW = QuantiseConfig("int8", 4)


@pytest.mark.slow
def test_sft_reward_rl_and_sampling_over_a_quantised_base(base, tmp_path):
    fields = {"quantise": LOW, "lora": LoRAConfig(rank=5, dora=True)}
    policy = commands.run_sft(tiny.sft_config(tmp_path / "sft", base, **fields))
    reward = commands.run_reward(tiny.reward_config(tmp_path / "reward", base, **fields))
    tuned = commands.run_rl(tiny.rl_config(tmp_path / "rl", base, policy, reward, **fields))
    rows = tiny.rows(tmp_path / "rl")
    assert rows[0]["kl/sequence"] == 0.0 and abs(rows[-1]["kl/sequence"]) > 0
    assert all(row["sampler/mismatch"] == pytest.approx(1, abs=1e-4) for row in rows)
    cost = tiny.read(tmp_path / "sft" / "cost.json")
    assert cost["base_bytes"] < 4 * (cost["parameters_total"] - cost["parameters_trainable"])
    assert (
        len(
            run_generate(
                GenerateConfig(
                    model=base,
                    adapter=str(tuned),
                    quantise=LOW,
                    prompt="latte",
                    max_new_tokens=4,
                    samples=2,
                )
            )
        )
        == 2
    )
    # The artefact belongs to the true base, and says how the base was held.
    assert read_record(tuned).quantise == LOW
    assert "base held in   int8, block 4" in show(ShowConfig(str(tuned)))
    model = load_model(ModelOptions(model=base))
    low = load_model(ModelOptions(model=base, quantise=LOW))
    assert model.fingerprint == low.fingerprint and any(
        map(is_quantised, jax.tree.leaves(low.base, is_leaf=is_quantised))
    )
    leaves = [
        np.asarray(leaf)
        for m in (model, low)
        for leaf in jax.tree.leaves(m.load_role(tuned, "policy")[0])
    ]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    with pytest.raises(
        UserError, match=r"made from unquantised weights; leave --quantise\.kind out"
    ):
        run_export(
            ExportConfig(
                model=base,
                adapter=str(policy),
                format="merged",
                to=str(tmp_path / "to"),
                quantise=LOW,
            )
        )


def test_full_tuning_of_a_quantised_base_is_refused(base, tmp_path):
    with pytest.raises(
        UserError, match=r"Full tuning trains the base's weights; quantise\.kind must be none"
    ):
        commands.run_sft(tiny.sft_config(tmp_path / "sft", base, tuning="full", quantise=LOW))
