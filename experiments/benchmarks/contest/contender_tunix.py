"""One GRPO step by Google's Tunix (google-tunix 0.1.7), driven over its standard streams.

Claim     What Tunix takes for the step the contest asks of every contender, at the fastest of its
          settings: RLCluster and GRPOLearner as they are, the vanilla rollout, a LoRA made by qwix,
          the reference sharing the policy's base, float32.
Command   python experiments/benchmarks/contest/contender_tunix.py --work FOLDER --job rl-function
          (prints a line when warm, then a line for each line "step" it reads; all else goes to
          stderr)
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/speed_cpu.md)
Time      a minute to the first line
Numbers   25.0 s a step (generate 10.4, reference 3.9, learn 10.6), 3,720 MiB; 22.8 and 26.4 s in
          runs before

Where Tunix departs from the letter of the work, or would without the lines marked below:
- Its Llama takes rope_theta in its configuration and rotates by 1e6 whatever that says; here the
  folder's value is put in its place.
- Its vanilla rollout draws from key 0 at every call unless told; here every step has its own seed.
- It cannot forbid a token: an end is made to end nothing, and a sampled <pad> (one token in 16384)
  is sampled, attended by nothing and left out of the loss.
- It decodes one token more than it returns, and computes the logits of the prompt too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import contender
import jax
import numpy as np
import optax
import qwix
import transformers
import work
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from work import ALPHA, KL_WEIGHT, NEW_TOKENS, PROMPT_TOKENS, PROMPTS, RANK, SAMPLES

JOB = "rl-function"
LEARNING_RATE = 1e-4
NO_TOKEN = -1
PACKAGES = ("google-tunix", "qwix", "jax", "jaxlib", "flax", "optax", "transformers")
COMPILATION = "/jax/core/compile/backend_compile_duration"
MOST_WARM_UP_STEPS = 6


@dataclasses.dataclass(frozen=True)
class Settings:
    """Prompts at a time in each part of a step, and what the backward pass computes again (a name
    of Tunix's RematConfig).
    """

    rollout: int = 8
    reference: int = 2
    learn: int = 1
    remat: str = "NONE"

    def __post_init__(self) -> None:
        for name in ("rollout", "reference", "learn"):
            if getattr(self, name) not in (1, 2, 4, 8):
                raise ValueError(f"{name} must be 1, 2, 4 or 8 prompts, not {getattr(self, name)}")
        if self.remat not in llama.RematConfig.__members__:
            raise ValueError(
                f"remat must be one of {list(llama.RematConfig.__members__)}, not {self.remat}"
            )


@dataclasses.dataclass
class Meter:
    """What the step under way has taken so far: seconds by part, tokens sampled, programs
    compiled.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    compilations: int = 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its seconds until its result is there added to `part`, the tokens of a
        rollout counted.
        """

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            if isinstance(result, base_rollout.RolloutOutput):
                self.tokens += sum(map(len, result.tokens))
            return result

        return call

    def compiled(self, event: str, seconds: float, **_: Any) -> None:
        """Counts a compilation (a listener to JAX's own events)."""
        self.compilations += event == COMPILATION


def even_words(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The contest's reward, called as Tunix calls rewards."""
    return contender.even_words(prompts, completions)


def load_policy(
    folder: pathlib.Path, mesh: jax.sharding.Mesh, remat: str
) -> tuple[nnx.Module, nnx.Module]:
    """The folder's model twice over one set of base weights: with a LoRA on q, k, v and o, and
    without.
    """
    values = json.loads((folder / "config.json").read_text())
    theta = values.get("rope_theta") or values["rope_parameters"]["rope_theta"]
    config = llama.ModelConfig(
        num_layers=values["num_hidden_layers"],
        vocab_size=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=values["rms_norm_eps"],
        weight_tying=values["tie_word_embeddings"],
        remat_config=llama.RematConfig[remat],
    )
    # The model ignores the configuration's rope_theta (see above).
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=theta)
    base = llama_params.create_model_from_safe_tensors(
        str(folder), config, mesh, dtype=work.SIZE.dtype
    )
    provider = qwix.LoraProvider(
        module_path=r".*(q_proj|k_proj|v_proj|o_proj)", rank=RANK, alpha=ALPHA
    )
    policy = qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(0), **base.get_model_input())
    return policy, base


def build_cluster(folder: pathlib.Path, settings: Settings) -> rl_cluster.RLCluster:
    """Tunix's cluster: one device in every role, hence one copy of the base for policy, rollout and
    reference.
    """
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(auto, auto))
    policy, base = load_policy(folder, mesh, settings.remat)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(LEARNING_RATE),
        eval_every_n_steps=sys.maxsize,
        max_steps=sys.maxsize,
        mini_batch_size=PROMPTS,
        train_micro_batch_size=settings.learn,
        rollout_micro_batch_size=settings.rollout,
        compute_logps_micro_batch_size=settings.reference,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=NEW_TOKENS,
        max_prompt_length=PROMPT_TOKENS,
        kv_cache_size=PROMPT_TOKENS + NEW_TOKENS,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[NO_TOKEN],
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    return rl_cluster.RLCluster(
        actor=policy,
        reference=base,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )


def adapter(cluster: rl_cluster.RLCluster) -> list[jax.Array]:
    """The policy's LoRA parameters, as they are now."""
    return jax.tree.leaves(nnx.state(cluster.actor_trainer.model, nnx.LoRAParam))


def check_step(before: list[np.ndarray], after: list[jax.Array], tokens: int) -> None:
    """Raises unless the step sampled all its tokens and moved the adapter to finite numbers."""
    contender.check_tokens(JOB, tokens)
    if not all(np.isfinite(x).all() for x in after):
        raise RuntimeError("the step left numbers in the adapter that are not finite")
    if all(np.array_equal(x, y) for x, y in zip(before, after, strict=True)):
        raise RuntimeError("the step left the adapter as it was")


def warm_up(meter: Meter) -> Iterator[None]:
    """A turn a step, until one has gone by without a compilation."""
    for _ in range(MOST_WARM_UP_STEPS):
        meter.compilations = 0
        yield
        if not meter.compilations:
            return
    raise RuntimeError(f"still compiling after {MOST_WARM_UP_STEPS} steps")


def wanted(
    cluster: rl_cluster.RLCluster, meter: Meter, protocol: contender.Protocol, settings: Settings
) -> Iterator[None]:
    """A turn a step: first those of the warm-up, then one a line of the protocol, its figures
    reported when it is over.
    """
    yield from warm_up(meter)
    protocol.ready("tunix", contender.versions(PACKAGES), describe(settings))
    while protocol.wait():
        before = [np.array(x) for x in adapter(cluster)]
        meter.seconds, meter.tokens = {}, 0
        yield
        after = jax.block_until_ready(adapter(cluster))
        check_step(before, after, meter.tokens)
        protocol.report(meter.tokens, meter.seconds)


def batches(
    prompts: list[str], rollout: base_rollout.RolloutConfig, turns: Iterator[None]
) -> Iterator[dict[str, np.ndarray]]:
    """The data set: a batch a turn, round and round the prompts.

    The learner asks for a batch when it is done with the one before and not sooner (its rollout
    shares the learner's devices, which keeps it from running ahead): a turn lasts from its batch to
    the next request.
    """
    groups = itertools.cycle(
        [prompts[i : i + PROMPTS] for i in range(0, len(prompts) - PROMPTS + 1, PROMPTS)]
    )
    for seed, (group, _) in enumerate(zip(groups, turns, strict=False)):
        rollout.seed = seed  # without it every step would draw from the same key
        yield {"prompts": np.array(group)}


def run(folder: pathlib.Path, settings: Settings, protocol: contender.Protocol) -> None:
    """Trains for as long as the protocol asks."""
    meter = Meter()
    jax.monitoring.register_event_duration_secs_listener(meter.compiled)
    cluster = build_cluster(folder / "model", settings)
    algorithm = grpo_learner.GRPOConfig(
        num_generations=SAMPLES, num_iterations=1, beta=KL_WEIGHT, kl_loss_mode="low_var_kl"
    )
    learner = grpo_learner.GRPOLearner(cluster, algorithm, reward_fns=even_words)
    if learner.should_sync_weights or learner.can_enable_async_rollout:
        raise RuntimeError(
            "the rollout was to share the policy's weights and to run in step with it"
        )
    cluster.generate = meter.timed("generate", cluster.generate)
    cluster.get_ref_per_token_logps = meter.timed("reference", cluster.get_ref_per_token_logps)
    cluster.update_actor = meter.timed("learn", cluster.update_actor)
    prompts = [row["prompt"] for row in contender.read_rows(folder, JOB)]
    turns = wanted(cluster, meter, protocol, settings)
    learner.train(batches(prompts, cluster.get_rollout_config(rl_cluster.Mode.TRAIN), turns))


def describe(settings: Settings) -> str:
    """The settings in a line."""
    sizes = (
        f"prompts at a time: {settings.rollout} in the rollout, {settings.reference} in the "
        f"reference, {settings.learn} in the update"
    )
    return (
        f"{sizes}; remat {settings.remat}; {work.SIZE.dtype}; vanilla rollout; base shared "
        "with the reference"
    )


def main() -> None:
    """The command line."""
    parser = contender.parser(__doc__, [JOB])
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={},
        help="JSON: fields of Settings in the place of the fastest ones",
    )
    arguments = parser.parse_args()
    if arguments.tuning != "lora":
        parser.error("Tunix is in the contest with adapters alone")
    settings = Settings(**arguments.settings)
    protocol = contender.Protocol()
    jax.config.update("jax_platforms", work.SIZE.platform)
    if work.SIZE.device == "gpu":
        protocol.peak_bytes = lambda: jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    run(arguments.work, settings, protocol)


if __name__ == "__main__":
    main()
