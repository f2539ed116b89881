"""What commands compile is in the planner's table: a new program has to be planned before it can be
run.
"""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from perl_jax.evaluation.best_of import BestOfConfig, run_best_of
from perl_jax.evaluation.compare import run_evaluate
from perl_jax.evaluation.score import ScoreConfig, score
from perl_jax.generation.text import GenerateConfig, run_generate
from perl_jax.hub.export import ExportConfig, run_export
from perl_jax.planning.known import APART, COMMANDS, PLANNED, unknown
from perl_jax.training import dpo, reward, rl, sft
from perl_jax.training import loop as loop_lib
from perl_jax.training.commands import DPOCommand, run_dpo, run_reward, run_rl, run_sft
from perl_jax.training.state import TrainState
from tests.compiled import Compiled
from tests.training import tiny

# Rows times columns of a batch, of both sides of a pair.
BATCH = 2 * 8 * 16


def check(compiled: Compiled, command: str) -> None:
    names = unknown(compiled.sizes, command)
    assert not names, (
        f"{command} runs programs that perl_jax/planning/known.py does not have: "
        f"{', '.join(sorted(names))}"
    )
    large = {
        name: size
        for name, size in compiled.sizes.items()
        if APART.get(name) == "rows" and size > BATCH
    }
    assert not large, f"operations outside a program on more than a batch's numbers: {large}"


def test_the_chain_of_jobs_runs_known_programs(jobs, compiled_by_jobs):
    """SFT, reward, RL and evaluation together, as far as this process had not compiled the same
    before.
    """
    known, found = (
        {name for group in (PLANNED, APART) for name in group},
        set(compiled_by_jobs.sizes),
    )
    assert found <= known, f"not in perl_jax/planning/known.py: {sorted(found - known)}"
    assert {"learn", "validate", "sample", "logprobs", "begin"} <= found


def runs(jobs: tiny.Jobs, folder: pathlib.Path) -> dict[str, Callable[[], Any]]:
    """Each command, on what the chain left behind."""
    base, policy, reward = jobs.base, str(jobs.policy), str(jobs.reward)
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "a tea", "response": "yes"}\n')
    rewarded = {"model": base, "reward": (reward,), "data": tiny.DATA, "batch_size": 8}
    return {
        "sft": lambda: run_sft(tiny.sft_config(folder / "sft", base, steps=1)),
        "reward": lambda: run_reward(tiny.reward_config(folder / "reward", base, steps=1)),
        "rl": lambda: run_rl(tiny.rl_config(folder / "rl", base, policy, reward, steps=1)),
        "dpo": lambda: run_dpo(
            DPOCommand(
                **{
                    **tiny.COMMON,
                    "run": str(folder / "dpo"),
                    "model": base,
                    "policy": policy,
                    "steps": 1,
                }
            )
        ),
        "evaluate": lambda: run_evaluate(
            tiny.evaluate_config(folder / "evaluate", base, policy=policy, reward=(reward,))
        ),
        "best-of": lambda: run_best_of(
            BestOfConfig(**rewarded, policy=policy, n=2, output=str(folder / "best.jsonl"))
        ),
        "generate": lambda: run_generate(
            GenerateConfig(model=base, adapter=policy, prompt="a tea", max_new_tokens=4)
        ),
        "score": lambda: score(
            ScoreConfig(
                model=base,
                adapter=reward,
                input=str(rows),
                max_prompt_length=16,
                max_response_length=16,
            )
        ),
        "export": lambda: [
            run_export(
                ExportConfig(model=base, adapter=reward, format="peft", to=str(folder / "peft"))
            ),
            run_export(
                ExportConfig(model=base, adapter=policy, format="merged", to=str(folder / "merged"))
            ),
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_known_programs(jobs, tmp_path, command):
    run = runs(jobs, tmp_path)[command]
    jax.clear_caches()
    with Compiled() as compiled:
        run()
    assert "sample_leaf" in compiled.sizes
    check(compiled, command)


def test_a_program_that_is_not_in_the_table_is_noticed():
    with Compiled() as compiled:
        jax.jit(lambda x: x + 1, inline=False)(jax.numpy.zeros(3))
    assert unknown(compiled.sizes, "sft") == {"<lambda>"}


class Began(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize("job", ["sft", "reward", "dpo", "rl"])
def test_full_tuning_has_its_weights_on_the_devices_once(jobs, tmp_path, monkeypatch, job):
    """When training begins there are the weights, two moments of each, and roles at rest; nothing
    of what they were made of.
    """
    shape = (2, 16, 24)
    alive = lambda: sum(array.shape == shape for array in jax.live_arrays())
    matrices = lambda adapter: sum(leaf.shape == shape for leaf in jax.tree.leaves(adapter))
    found: list[tuple[int, int]] = []

    def begins(config, state, *_):
        gc.collect()
        found.append((alive() - before, matrices(state)))
        raise Began

    for module in (sft, reward, dpo, rl):
        monkeypatch.setattr(module, "train", begins)
    gc.collect()
    before = alive()
    common = {"tuning": "full", "steps": 1}
    run = {
        "sft": lambda: run_sft(tiny.sft_config(tmp_path / "run", jobs.base, **common)),
        "reward": lambda: run_reward(tiny.reward_config(tmp_path / "run", jobs.base, **common)),
        "dpo": lambda: run_dpo(
            DPOCommand(**tiny.common(run=str(tmp_path / "run"), model=jobs.base, **common))
        ),
        "rl": lambda: run_rl(
            tiny.rl_config(tmp_path / "run", jobs.base, None, jobs.reward, **common)
        ),
    }[job]
    with pytest.raises(Began):
        run()
    # Gate and up have this shape. In rl there are two trained roles and a reference, and the
    # adapter that rewards reads the base.
    weights = {"sft": 3, "reward": 3, "dpo": 4, "rl": 7}[job]
    base = 1 if job == "rl" else 0
    assert found == [(2 * (weights + base), 2 * weights)]


def test_a_state_that_gives_way_leaves_nothing_on_the_devices():
    state = TrainState(
        jax.numpy.int32(3),
        {},
        {},
        {},
        jax.random.key_data(jax.random.key(0)),
        {"beta": jax.numpy.float32(0.5)},
    )
    leaves = jax.tree.leaves(state)
    kept = loop_lib._given_up(state)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)] == [
        (leaf.shape, leaf.dtype) for leaf in leaves
    ]
