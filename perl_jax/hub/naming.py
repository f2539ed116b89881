"""Names of a checkpoint's tensors behind the leaves of a base."""

from __future__ import annotations

from perl_jax.models.config import ModelConfig

_MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
}
_PRE_NORMS = {"mlp_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OUTER = {"embedding": "model.embed_tokens", "final_norm/scale": "model.norm", "lm_head": "lm_head"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def module_names(config: ModelConfig) -> dict[str, str]:
    """Returns the path in the checkpoint of each module of a layer, by the module's path here.

    For example {"attention/q": "self_attn.q_proj"}; the checkpoint's paths are below
    `model.layers.N`.
    """
    return _MODULES | (_SANDWICH_NORMS if config.sandwich_norms else _PRE_NORMS)


def tensor_names(name: str, config: ModelConfig) -> list[str]:
    """Returns the names of the checkpoint's tensors that a base leaf is made of.

    There is one for each layer, in order, or a single one for a leaf outside the layers.

    Args:
        name: The leaf, such as `layers/attention/q/kernel` or `outer/embedding`.
        config: The base model's configuration.
    """
    part, _, rest = name.partition("/")
    if part == "outer":
        return [_OUTER[rest] + ".weight"]
    module, _, leaf = rest.rpartition("/")
    path = f"{module_names(config)[module]}.{_LEAVES[leaf]}"
    return [f"model.layers.{index}.{path}" for index in range(config.layers)]


def transposed(name: str) -> bool:
    """Returns whether a leaf's tensor in the checkpoint is the transpose of the leaf.

    torch stores kernels as [out, in], this package as [in, out].

    Args:
        name: The leaf, such as `layers/attention/q/kernel`.
    """
    return name.endswith(("kernel", "lm_head"))
