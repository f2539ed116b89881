"""A family of models of your own: a Llama with biases on q, k and v, under its own model_type."""

from transformers import AutoConfig, LlamaConfig

import perl_jax as pj


class HouseConfig(LlamaConfig):
    """What transformers has to know: old spellings and defaults of config.json."""

    model_type = "house_llama"


def settings(values):
    """Fields of perl_jax's ModelConfig, from transformers' config object."""
    return {"biases": ("q", "k", "v")}


AutoConfig.register("house_llama", HouseConfig)
pj.register_family("house_llama", pj.Family(frozenset({"hidden_act"}), settings))
