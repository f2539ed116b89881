"""TRL's own losses and advantages on given logits and rewards, in NumPy: an independent reference
for tests.

No formula of a loss is written here: every function runs the method of TRL's trainer (trl 1.16.0,
torch on the CPU). The trainer is made without its constructor; its settings come from TRL's own
config class, so what is not set has TRL's default. Per-token arrays follow
`perl_jax.models.logprobs`: column t belongs to token t, whose logits are in column t - 1, and
column 0 is never in a mask. TRL accumulates log-probabilities in float32, also of float64 logits;
logits must be finite.

Without trl a test is skipped. The first call imports the trainers: about 7 s. TRL has no PPO since
1.13.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

# For every config: TRL's defaults are bfloat16 and gradient checkpointing, which no loss reads.
CPU = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
# The losses of TRL's DPO that read `label_smoothing`; 'sigmoid' does not.
SMOOTHED = ("robust", "exo_pair")


class GivenLogits:
    """A language model whose logits are given: they are its hidden states, and its head is the
    identity.

    `trl.trainer.utils.add_fused_lm_head` gives it the forward pass that TRL gives to its policies.
    """

    training = True

    def __init__(self, logits: Any, temperature: float = 1.0) -> None:
        torch, _ = modules()
        from trl.trainer.utils import add_fused_lm_head

        self.config = types.SimpleNamespace(get_text_config=types.SimpleNamespace)
        self.hidden = types.SimpleNamespace(last_hidden_state=logits)
        self.head = types.SimpleNamespace(
            weight=torch.eye(logits.shape[-1], dtype=logits.dtype), bias=None
        )
        add_fused_lm_head(
            self, temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1")
        )

    def base_model(self, **inputs: Any) -> Any:
        return self.hidden

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, **inputs: Any) -> Any:
        raise NotImplementedError("only the fused head is in use")

    def __call__(self, **inputs: Any) -> Any:
        return self.forward(**inputs)


def logprobs(logits_BTV: np.ndarray, tokens_BT: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """logp_BT of every token under softmax(logits / temperature), by TRL's fused head; column 0 is
    0.
    """
    torch, _ = modules()
    model = GivenLogits(torch.tensor(np.asarray(logits_BTV)), temperature)
    logp = model(labels=_integers(tokens_BT), fused_lm_head=True).log_probs
    return torch.nn.functional.pad(logp, (1, 0)).numpy()


def grpo(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    old_logp_BT: np.ndarray | None,
    ref_logp_BT: np.ndarray | None,
    advantages_B: np.ndarray,
    *,
    loss_type: str,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    use_bias_correction_kl: bool = True,
) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of `GRPOTrainer.compute_loss`, one micro-batch that is the
    whole batch.

    loss_type: 'grpo', 'bnpo', 'dr_grpo' (alone in reading `max_completion_length`), 'dapo' and
    TRL's others. importance_sampling_level: 'token', or 'sequence' for GSPO. old_logp_BT: None
    makes every ratio 1. ref_logp_BT: None only with beta 0. use_bias_correction_kl: the KL times
    the ratio, TRL's default.
    """
    _, trl = modules()
    _check(mask_BT)
    if beta and ref_logp_BT is None:
        raise ValueError("beta is not 0: ref_logp_BT is needed")
    config = trl.GRPOConfig(
        **CPU,
        loss_type=loss_type,
        beta=beta,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        importance_sampling_level=importance_sampling_level,
        max_completion_length=max_completion_length,
        temperature=temperature,
        use_bias_correction_kl=use_bias_correction_kl,
    )
    inputs = _completions(tokens_BT, mask_BT, advantages_B)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    for name, logp_BT in (
        ("old_per_token_logps", old_logp_BT),
        ("ref_per_token_logps", ref_logp_BT),
    ):
        if logp_BT is not None:
            inputs[name] = _inside(logp_BT, mask_BT)[:, 1:]
    trainer = _trainer(trl.GRPOTrainer, config, **_clip(config), _entropy_bonus_enabled=False)
    return _policy_gradient(trainer, logits_BTV, inputs, temperature)


def rloo(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    old_logp_BT: np.ndarray | None,
    advantages_B: np.ndarray,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    temperature: float = 1.0,
) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of `RLOOTrainer.compute_loss`; old_logp_BT None makes every
    ratio 1.

    The KL is not in the loss but in the advantages (`rloo_advantages`).
    """
    _, trl = modules()
    _check(mask_BT)
    config = trl.RLOOConfig(
        **CPU, epsilon=epsilon, epsilon_high=epsilon_high, temperature=temperature
    )
    if old_logp_BT is None:
        old_logp_BT = logprobs(logits_BTV, tokens_BT, temperature)
    inputs = _completions(tokens_BT, mask_BT, advantages_B)
    inputs["old_logps"] = _inside(old_logp_BT, mask_BT).sum(1)
    return _policy_gradient(
        _trainer(trl.RLOOTrainer, config, **_clip(config)), logits_BTV, inputs, temperature
    )


def dpo(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    ref_logp_BT: np.ndarray,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of `DPOTrainer.compute_loss`: 'sigmoid' (DPO), 'ipo',
    'robust' and TRL's others.

    The first half of the rows is chosen, the second half rejected, pair by pair.
    """
    _, trl = modules()
    _check(mask_BT)
    if label_smoothing and loss_type not in SMOOTHED:
        raise ValueError(
            f"TRL reads label_smoothing in {', '.join(SMOOTHED)} alone, not in {loss_type}"
        )
    config = trl.DPOConfig(**CPU, beta=beta, loss_type=[loss_type], label_smoothing=label_smoothing)
    trainer = _trainer(
        trl.DPOTrainer,
        config,
        loss_types=config.loss_type,
        loss_weights=[1.0],
        precompute_ref_logps=True,
    )
    ref_chosen_B, ref_rejected_B = _inside(ref_logp_BT, mask_BT).sum(1).chunk(2)
    tokens_BT = _integers(tokens_BT)
    inputs = {
        "input_ids": tokens_BT,
        "attention_mask": tokens_BT.new_ones(tokens_BT.shape),
        "completion_mask": _integers(mask_BT),
        "ref_chosen_logps": ref_chosen_B,
        "ref_rejected_logps": ref_rejected_B,
    }
    return _policy_gradient(trainer, logits_BTV, inputs, temperature=1.0)


def kto(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    ref_logp_BT: np.ndarray,
    label_B: np.ndarray,
    others: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[float, np.ndarray, float]:
    """Loss and gradient in the logits of `KTOTrainer._compute_loss`, and its estimate of the KL.

    others: tokens, mask and reference log-probabilities of the mismatched responses, whose logits
    are the same.
    """
    torch, trl = modules()
    _check(mask_BT)
    config = trl.KTOConfig(
        **CPU,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    trainer = _trainer(trl.KTOTrainer, config, calculate_KL=True, precompute_ref_logps=True)
    other_BT, other_mask_BT, other_ref_BT = others
    ones = lambda tokens_BT: torch.ones_like(_integers(tokens_BT))
    inputs = {
        "input_ids": _integers(tokens_BT),
        "attention_mask": ones(tokens_BT),
        "completion_mask": _integers(mask_BT),
        "KL_input_ids": _integers(other_BT),
        "KL_attention_mask": ones(other_BT),
        "KL_completion_mask": _integers(other_mask_BT),
        "label": torch.tensor(np.asarray(label_B) > 0.5),
        "ref_logps": _inside(ref_logp_BT, mask_BT).sum(1),
        "ref_KL_logps": _inside(other_ref_BT, other_mask_BT).sum(1),
    }

    def loss(logits_BTV: Any) -> Any:
        trainer.model = GivenLogits(logits_BTV)
        return trainer._compute_loss(trainer.model, inputs, False)

    return *_differentiate(loss, logits_BTV), trainer._metrics["train"]["kl"][0]


def orpo(
    logits_BTV: np.ndarray, tokens_BT: np.ndarray, mask_BT: np.ndarray, *, beta: float
) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of `ORPOTrainer.get_batch_loss_metrics`.

    The first half of the rows is chosen, the second half rejected, pair by pair. TRL's
    log-likelihood of the chosen rows covers prompts too, as a mean over all tokens.
    """
    torch, _ = modules()
    _check(mask_BT)
    experimental = pytest.importorskip("trl.experimental.orpo")
    config = experimental.ORPOConfig(**CPU, beta=beta)
    trainer = _trainer(experimental.ORPOTrainer, config, is_encoder_decoder=False)
    tokens_BT, mask_BT = _integers(tokens_BT), _integers(mask_BT)
    labels_BT = torch.where(mask_BT == 1, tokens_BT, -100)
    batch = {"concatenated_input_ids": tokens_BT, "concatenated_labels": labels_BT}
    batch["concatenated_attention_mask"] = torch.ones_like(tokens_BT)
    trainer.concatenated_inputs = lambda *_, **__: batch
    given = {"chosen_labels": labels_BT[: len(labels_BT) // 2]}

    def loss(logits_BTV: Any) -> Any:
        model = lambda *_, **__: types.SimpleNamespace(logits=logits_BTV)
        return trainer.get_batch_loss_metrics(model, given)[0]

    return _differentiate(loss, logits_BTV)


def online_dpo(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    ref_logits_BTV: np.ndarray,
    reward_B: np.ndarray,
    *,
    beta: float,
    loss_type: str = "sigmoid",
) -> tuple[float, np.ndarray]:
    """Loss and gradient in the logits of `OnlineDPOTrainer.training_step`, its generation and its
    rewards replaced.

    The first half of the rows are the first responses to each prompt, the second half the second
    ones. Column 0 is the prompt.
    """
    torch, _ = modules()
    _check(mask_BT)
    experimental = pytest.importorskip("trl.experimental.online_dpo")
    config = experimental.OnlineDPOConfig(**CPU, beta=[beta], loss_type=loss_type)
    tokens_BT, mask_BT = _integers(tokens_BT), _integers(mask_BT)
    prompt_mask = torch.ones_like(tokens_BT[:, :1])
    generated = (tokens_BT[:, :1], prompt_mask, tokens_BT[:, 1:], mask_BT[:, 1:])
    found = {}

    class Model:
        """A model of given logits."""

        def __init__(self, logits: Any) -> None:
            self.logits = logits

        def train(self) -> None:
            pass

        def __call__(self, *_: Any, **__: Any) -> Any:
            return types.SimpleNamespace(logits=self.logits)

    trainer = _trainer(
        experimental.OnlineDPOTrainer,
        config,
        ref_model=Model(torch.tensor(np.asarray(ref_logits_BTV))),
        reward_funcs=[None],
        eos_token_ids=[-1],
        max_length=10_000,
        processing_class=types.SimpleNamespace(
            batch_decode=lambda ids, **_: [""] * len(ids), eos_token_id=-1
        ),
        stats=collections.defaultdict(list),
        _beta=[beta],
    )
    trainer._generate = lambda *_: (*generated, None)
    trainer._calculate_rewards_from_functions = lambda **_: torch.tensor(np.asarray(reward_B))
    trainer.accelerator.backward = lambda loss, **_: found.setdefault("loss", loss)

    def loss(logits_BTV: Any) -> Any:
        trainer.training_step(Model(logits_BTV), {"prompt": [""] * (len(tokens_BT) // 2)})
        return found["loss"]

    return _differentiate(loss, logits_BTV)


def reward(
    chosen_B: np.ndarray,
    rejected_B: np.ndarray,
    margin_B: np.ndarray | None = None,
    center_coefficient: float | None = None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradients in the scores, chosen then rejected, of `RewardTrainer.compute_loss`."""
    torch, trl = modules()
    config = trl.RewardConfig(**CPU, center_rewards_coefficient=center_coefficient)
    trainer = _trainer(trl.RewardTrainer, config, model=types.SimpleNamespace(training=True))
    inputs = {"attention_mask": torch.ones(2 * len(chosen_B), 1)}
    if margin_B is not None:
        inputs["margin"] = torch.tensor(np.asarray(margin_B))

    def loss(score_B: Any) -> Any:
        return trainer.compute_loss(
            lambda **_: types.SimpleNamespace(logits=score_B[:, None]), inputs
        )

    value, gradient_B = _differentiate(loss, np.concatenate([chosen_B, rejected_B]))
    return value, *np.split(gradient_B, 2)


def grpo_advantages(
    rewards_B: np.ndarray, num_generations: int, scale_rewards: str | bool = "group"
) -> np.ndarray:
    """advantages_B by `GRPOTrainer._generate_and_score_completions`, its generation replaced by
    one-token responses.

    Samples of one prompt are neighbours. scale_rewards: 'group', 'batch', or 'none' (False) for Dr.
    GRPO. A reward of NaN is what a reward function's None becomes.
    """
    _, trl = modules()
    rows = len(rewards_B)
    config = trl.GRPOConfig(
        **CPU,
        per_device_train_batch_size=rows,
        num_generations=num_generations,
        scale_rewards=scale_rewards,
    )
    trainer = _trainer(
        trl.GRPOTrainer,
        config,
        **_scoring(rewards_B),
        environments=None,
        environment_factories=None,
        tools=None,
    )
    one_token = [[1]] * rows
    trainer._generate = lambda prompts: (
        one_token,
        one_token,
        None,
        [""] * rows,
        None,
        {},
        None,
        [],
    )
    return trainer._generate_and_score_completions([{"prompt": ""}] * rows)["advantages"].numpy()


def rloo_advantages(
    rewards_B: np.ndarray,
    num_generations: int,
    *,
    beta: float = 0.0,
    old_logp_BT: np.ndarray | None = None,
    ref_logp_BT: np.ndarray | None = None,
    mask_BT: np.ndarray | None = None,
    normalize_advantages: bool = False,
    reward_clip_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """advantages_B by `RLOOTrainer._generate_and_score_completions`, its generation and its models
    replaced.

    Samples of one prompt are neighbours. A beta other than 0 needs the three per-token arrays;
    every row of the mask then has a token.
    """
    torch, trl = modules()
    rows = len(rewards_B)
    config = trl.RLOOConfig(
        **CPU,
        per_device_train_batch_size=rows,
        num_generations=num_generations,
        beta=beta,
        normalize_advantages=normalize_advantages,
        reward_clip_range=reward_clip_range,
    )
    if beta:
        _check(mask_BT)
    else:
        mask_BT = np.ones((rows, 1), bool)
        old_logp_BT = ref_logp_BT = np.zeros((rows, 1), np.float32)
    reference = types.SimpleNamespace()
    trainer = _trainer(trl.RLOOTrainer, config, **_scoring(rewards_B), ref_model=reference)
    lengths_B = np.sum(mask_BT, axis=1).tolist()
    trainer._generate = lambda prompts: (
        [[1]] * rows,
        [[1] * length for length in lengths_B],
        [""] * rows,
    )

    def completion_logps(model: Any, *inputs: Any, **options: Any) -> tuple[Any, None, None]:
        """TRL's layout: the tokens under the mask, moved to the left."""
        logp_BT = ref_logp_BT if model is reference else old_logp_BT
        responses = [
            torch.tensor(logp_T[mask_T])
            for logp_T, mask_T in zip(np.asarray(logp_BT), np.asarray(mask_BT), strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(responses, batch_first=True), None, None

    trainer._get_per_token_logps_and_entropies = completion_logps
    return trainer._generate_and_score_completions([{"prompt": ""}] * rows)["advantages"].numpy()


def modules() -> tuple[Any, Any]:
    """torch and trl; the test is skipped without them."""
    return pytest.importorskip("torch"), pytest.importorskip("trl", minversion="1.16.0")


def _trainer(trainer_class: type, config: Any, **attributes: Any) -> Any:
    """A trainer without a model or data; TRL's constructors copy most settings to attributes of the
    same names.
    """
    accelerate, transformers = (
        pytest.importorskip("accelerate"),
        pytest.importorskip("transformers"),
    )
    trainer = object.__new__(trainer_class)
    derived = {
        "args": config,
        "state": transformers.TrainerState(),
        # A new one each time: to make a config resets what accelerators share.
        "accelerator": accelerate.Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_metrics": {"train": collections.defaultdict(list)},
        "_tp_size": 1,
        "_total_train_tokens": 0,
    }
    vars(trainer).update(vars(config) | derived | attributes)
    return trainer


def _clip(config: Any) -> dict[str, float]:
    """The clipping range under the names of the trainers' attributes: symmetric unless epsilon_high
    is set.
    """
    return {
        "epsilon_low": config.epsilon,
        "epsilon_high": config.epsilon if config.epsilon_high is None else config.epsilon_high,
    }


def _scoring(rewards_B: np.ndarray) -> dict[str, Any]:
    """What a trainer needs to turn rewards into advantages."""
    torch, _ = modules()
    return {
        "model": types.SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "_tokenizer": types.SimpleNamespace(pad_token_id=0),
        "reward_funcs": [lambda **_: np.asarray(rewards_B).tolist()],
        "reward_func_names": ["reward"],
        "reward_processing_classes": [None],
        "reward_weights": torch.ones(1),
        "_logs": {name: [] for name in ("prompt", "completion", "advantages")}
        | {"rewards": {"reward": []}},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }


def _policy_gradient(
    trainer: Any, logits_BTV: np.ndarray, inputs: dict[str, Any], temperature: float
) -> tuple[float, np.ndarray]:
    def loss(logits_BTV: Any) -> Any:
        trainer.model = GivenLogits(logits_BTV, temperature)
        return trainer.compute_loss(trainer.model, inputs)

    return _differentiate(loss, logits_BTV)


def _differentiate(loss: Callable[[Any], Any], array: np.ndarray) -> tuple[float, np.ndarray]:
    torch, _ = modules()
    tensor = torch.tensor(np.asarray(array), requires_grad=True)
    value = loss(tensor)
    value.backward()
    return value.item(), tensor.grad.numpy()


def _completions(
    tokens_BT: np.ndarray, mask_BT: np.ndarray, advantages_B: np.ndarray
) -> dict[str, Any]:
    """A batch of TRL's: column 0 as the prompt, and the mask's gaps and padding inside the
    completion.
    """
    torch, _ = modules()
    tokens_BT, mask_BT = _integers(tokens_BT), _integers(mask_BT)
    return {
        "prompt_ids": tokens_BT[:, :1],
        "prompt_mask": torch.ones_like(tokens_BT[:, :1]),
        "completion_ids": tokens_BT[:, 1:],
        "completion_mask": mask_BT[:, 1:],
        "advantages": torch.tensor(np.asarray(advantages_B)),
    }


def _integers(array: np.ndarray) -> Any:
    torch, _ = modules()
    return torch.tensor(np.asarray(array), dtype=torch.long)


def _inside(logp_BT: np.ndarray, mask_BT: np.ndarray) -> Any:
    """0 outside the mask, as TRL's log-probabilities are."""
    torch, _ = modules()
    return torch.tensor(np.where(mask_BT, logp_BT, 0))


def _check(mask_BT: np.ndarray) -> None:
    if np.asarray(mask_BT)[:, 0].any():
        raise ValueError("column 0 has no log-probability: the mask must be False there")
