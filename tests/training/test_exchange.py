"""Adapters out to PEFT and transformers and back in: the same outputs, and nothing overwritten."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from perl_jax.adapters import combine
from perl_jax.adapters.lora import Adapter, LoRAConfig
from perl_jax.errors import UserError
from perl_jax.hub import artefacts, average, classifier, import_peft, peft, show, verify
from perl_jax.hub import export as exporting
from perl_jax.hub import weights as hf_checkpoint
from perl_jax.hub.model import Model, ModelOptions, TemplateOptions, load_model
from perl_jax.hub.tokenizer import Tokenizer, word_tokenizer
from perl_jax.hub.weights import find_model
from perl_jax.runtime import trees
from tests import small
from tests.hub.test_families import write_random

VARIANTS = {
    "plain": LoRAConfig(rank=3, alpha=7.0),
    "all-linear": LoRAConfig(rank=3, alpha=7.0, targets="all-linear"),
    "rank-stabilised": LoRAConfig(rank=3, alpha=2.0, rank_stabilised=True, targets="q,down"),
    "dora": LoRAConfig(rank=2, alpha=4.0, dora=True, targets="q,v,o,up,down"),
    "a-zero": LoRAConfig(rank=2, alpha=2.0, init="a-zero"),
    "pissa": LoRAConfig(rank=2, alpha=4.0, init="pissa", targets="all-linear"),
    "patterns": LoRAConfig(
        rank=4, alpha=8.0, targets="all-linear", ranks="q=2,down=6", alphas="v=3,down=1"
    ),
    "layers": LoRAConfig(rank=3, layers="1,3", targets="q,k,gate"),
    "dora-layers": LoRAConfig(
        rank=3, layers="2-3", dora=True, rank_stabilised=True, targets="v,down"
    ),
}
TOKENS = small.make_tokens()


# (family, variant, with a head): some, in this process; all of them by commands, at the end.
SOME = [
    ("llama", "dora", False),
    ("llama", "pissa", True),
    ("llama", "patterns", False),
    ("qwen2", "plain", True),
]
ALL = [("llama", variant) for variant in VARIANTS] + [
    ("qwen2", variant) for variant in ("all-linear", "dora", "pissa")
]
# One fresh process for several commands: each of them would import the libraries anew.
DRIVER = (
    "import json, sys; from perl_jax.cli.main import main; sys.exit(max(main(line) for line "
    "in json.loads(sys.argv[1])))"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Model]:
    """A base with every kind of output projection: an untied Llama, and a tied Qwen with biases."""
    root = tmp_path_factory.mktemp("models")
    settings = {"llama": {}, "qwen2": {"tie_word_embeddings": True, "head_dim": None}}
    return {kind: load(write_base(root / kind, kind, **more)) for kind, more in settings.items()}


@pytest.fixture
def model(request, models) -> Model:
    """The Llama, or the family that a test's parameters name."""
    return models[getattr(request, "param", "llama")]


def write_base(folder: pathlib.Path, kind: str = "llama", **settings: Any) -> pathlib.Path:
    write_random(folder, kind, **settings)
    word_tokenizer(["good", "bad", "fine", "tea", "coffee", "please", "yes", "no", "thanks"]).save(
        folder
    )
    return folder


def load(folder: pathlib.Path, **options: Any) -> Model:
    return load_model(ModelOptions(model=str(folder), **options))


def moved(model: Model, config: LoRAConfig, *, head: bool) -> Adapter:
    """A role as if trained: every trained leaf has moved away from its start."""
    noise = np.random.default_rng(4)
    fresh = model.lm.init_adapter(jax.random.key(1), config, model.base)
    shake = lambda name, leaf: (
        leaf
        + (0.3 if "magnitude" in name else 0.15)
        * noise.standard_normal(leaf.shape).astype(np.float32)
    )
    return fresh.replace(
        lora=trees.map_named(shake, fresh.lora), head=small.make_head(model.lm) if head else None
    )


def save(folder: pathlib.Path, model: Model, adapter: Adapter) -> pathlib.Path:
    moments = {} if adapter.head is None else {"score_mean": 0.4, "score_std": 2.5}
    role = "policy" if adapter.head is None else "reward"
    artefacts.save_artefact(
        folder, adapter, model.record(role, adapter, step=12, metrics={"auc": 0.7}, **moments)
    )
    return folder


def export(model: Model, artefact: pathlib.Path, form: str, to: pathlib.Path) -> float:
    return exporting.run_export(
        exporting.ExportConfig(model=model.name, adapter=str(artefact), format=form, to=str(to))
    ).difference


def torch_peft(model: Model, folder: pathlib.Path, *, head: bool) -> Any:
    """The base with a PEFT folder's adapter, in torch."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(torch_base(model.name, head=head), folder).eval()


def torch_base(folder: Any, *, head: bool) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not head:
        return small.load_torch(pathlib.Path(folder))
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", num_labels=1, pad_token_id=0
    ).eval()


def torch_outputs(torch_model: Any, *, head: bool) -> np.ndarray:
    """Logits at real tokens, or the classifier's logit of right-padded rows."""
    if not head:
        return small.torch_logits(torch_model, TOKENS)[TOKENS.valid_BT]
    torch = pytest.importorskip("torch")
    tokens = scored_tokens()
    # The classifier finds the last token by its id: padding must be 0 and nothing else may be.
    ids_BT = np.where(tokens.valid_BT, tokens.tokens_BT, 0)
    with torch.no_grad():
        mask = torch.tensor(tokens.valid_BT, dtype=torch.long)
        return (
            torch_model(input_ids=torch.tensor(ids_BT, dtype=torch.long), attention_mask=mask)
            .logits[:, 0]
            .numpy()
        )


def scored_tokens():
    tokens = small.make_tokens([("none", 11), ("right", 7), ("right", 1)])
    return tokens.replace(tokens_BT=np.maximum(tokens.tokens_BT, 1))


def outputs(model: Model, adapter: Adapter) -> np.ndarray:
    base = None if adapter.weights is not None else model.base
    if adapter.head is None:
        return np.array(small.logits(model.lm, base, adapter, TOKENS))[TOKENS.valid_BT]
    return np.array(small.score(model.lm, base, adapter, scored_tokens()))


# Out.


@pytest.mark.parametrize(("model", "variant", "head"), SOME, indirect=["model"])
def test_peft_gives_the_outputs_of_the_exported_adapter(tmp_path, model, variant, head):
    adapter = moved(model, VARIANTS[variant], head=head)
    artefact = save(tmp_path / "artefact", model, adapter)
    assert export(model, artefact, "peft", tmp_path / "peft") < 1e-4
    theirs = torch_outputs(torch_peft(model, tmp_path / "peft", head=head), head=head)
    mine = outputs(model, adapter)
    assert np.abs(mine - outputs(model, Adapter(head=adapter.head))).max() > 0.05
    if head:
        stated = json.loads((tmp_path / "peft" / "perl_jax_reward.json").read_text())
        theirs, mine = theirs + stated["offset"], (mine - 0.4) / 2.5
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    # And back in.
    import_peft.run_import(
        import_peft.ImportConfig(
            model=model.name, peft=str(tmp_path / "peft"), to=str(tmp_path / "again")
        )
    )
    again, record = model.load_role(tmp_path / "again", "reward" if head else "policy")
    found = outputs(model, again)
    np.testing.assert_allclose(
        np.asarray(record.normalise(found)) if head else found, mine, atol=1e-4
    )


@pytest.mark.parametrize(
    ("model", "variant", "head"),
    [("llama", "plain", False), ("qwen2", "plain", True)],
    indirect=["model"],
)
def test_transformers_loads_the_merged_export(tmp_path, model, variant, head):
    adapter = moved(model, VARIANTS[variant], head=head)
    artefact = save(tmp_path / "artefact", model, adapter)
    assert export(model, artefact, "merged", tmp_path / "merged") < 1e-4
    theirs = torch_outputs(torch_base(tmp_path / "merged", head=head), head=head)
    mine = outputs(model, adapter)
    if head:
        theirs, mine = (
            theirs
            + json.loads((tmp_path / "merged" / "perl_jax_reward.json").read_text())["offset"],
            (mine - 0.4) / 2.5,
        )
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_full_tuning_is_exported_whole(tmp_path, model):
    weights = jax.tree.map(
        lambda leaf: (
            leaf + 0.02 * np.random.default_rng(0).standard_normal(leaf.shape).astype(np.float32)
        ),
        model.base,
    )
    adapter = Adapter(weights=weights)
    artefact = save(tmp_path / "artefact", model, adapter)
    export(model, artefact, "merged", tmp_path / "merged")
    theirs = torch_outputs(torch_base(tmp_path / "merged", head=False), head=False)
    np.testing.assert_allclose(outputs(model, adapter), theirs, atol=1e-4)
    with pytest.raises(
        UserError, match="fully tuned role has no adapter; export it with --format merged"
    ):
        export(model, artefact, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists() and not list(tmp_path.glob(".peft*"))


def test_a_merged_export_keeps_the_bases_dtype_and_files(monkeypatch, tmp_path):
    # bfloat16 weights: W + s A B in float32, rounded once; in shards with an index.
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
    folder = write_base(tmp_path / "base")
    tensors = {
        name: array.astype(jnp.bfloat16)
        for name, array in safetensors.load_file(folder / "model.safetensors").items()
    }
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    adapter = moved(model, VARIANTS["plain"], head=False)
    export(model, save(tmp_path / "artefact", model, adapter), "merged", tmp_path / "merged")
    stored = hf_checkpoint.stored_tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"} and len(
        {tensor.path for tensor in stored.values()}
    ) > 1
    name, leaf = "model.layers.2.self_attn.v_proj.weight", trees.named_leaves(adapter.lora)
    a, b = (np.asarray(leaf[f"layers/attention/v/lora_{side}"][2], np.float64) for side in "ab")
    exact = tensors[name].astype(np.float64) + 7 / 3 * (a @ b).T
    np.testing.assert_array_equal(
        hf_checkpoint.read_tensor(stored[name]), exact.astype(np.float32).astype(jnp.bfloat16)
    )
    untouched = "model.layers.2.mlp.up_proj.weight"
    np.testing.assert_array_equal(hf_checkpoint.read_tensor(stored[untouched]), tensors[untouched])


@pytest.fixture(scope="module")
def low(tmp_path_factory) -> Model:
    """A base stored in bfloat16."""
    folder = write_base(tmp_path_factory.mktemp("low") / "base")
    tensors = {
        name: array.astype(jnp.bfloat16)
        for name, array in safetensors.load_file(folder / "model.safetensors").items()
    }
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load(folder)


def slightly_moved(model: Model, *, head: bool = False) -> Adapter:
    """A short training's adapter: its update is about as large as bfloat16's rounding of the
    weights.
    """
    adapter = moved(model, VARIANTS["all-linear"], head=head)
    return adapter.replace(
        lora=trees.map_named(
            lambda name, leaf: leaf * (0.004 if name.endswith("_b") else 1.0), adapter.lora
        )
    )


@pytest.mark.parametrize("head", [False, True])
def test_float32_weights_keep_what_bfloat16_rounds_away(tmp_path, low, head):
    adapter = slightly_moved(low, head=head)
    artefact = save(tmp_path / "artefact", low, adapter)
    settings = {"model": low.name, "adapter": str(artefact), "format": "merged"}
    with pytest.raises(
        UserError,
        match=r"Only \d+% of the adapter's effect survived .*; give --weights float32\. Nothing "
        r"was kept",
    ):
        exporting.run_export(exporting.ExportConfig(**settings, to=str(tmp_path / "stored")))
    done = exporting.run_export(
        exporting.ExportConfig(**settings, to=str(tmp_path / "whole"), weights="float32")
    )
    assert done.kept > 0.99 and f"{done.kept:.1%} of the adapter's effect survived" in done.note
    assert {
        tensor.dtype for tensor in hf_checkpoint.stored_tensors(tmp_path / "whole").values()
    } == {"F32"}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artefact", "whole"]


@pytest.mark.parametrize("weights", ["stored", "float32"])
def test_a_merged_export_without_the_adapter_is_not_kept(monkeypatch, tmp_path, low, weights):
    artefact = save(tmp_path / "artefact", low, slightly_moved(low))
    monkeypatch.setattr(exporting, "_merged_tensor", lambda adapter, name, layer, array: array)
    if weights == "float32":
        # In bfloat16 the outputs agree within its tolerance: comparing them alone keeps the base as
        # it was.
        monkeypatch.setattr(verify, "require_same", lambda *_: 0.0)
    with pytest.raises(UserError, match="Only 0% of the adapter's effect survived"):
        exporting.run_export(
            exporting.ExportConfig(
                model=low.name,
                adapter=str(artefact),
                format="merged",
                to=str(tmp_path / "to"),
                weights=weights,
            )
        )
    assert not (tmp_path / "to").exists()


def test_the_share_is_of_the_adapters_own_effect(tmp_path, low):
    # Written with B at 0.7 of its size: an effect this small is linear in B, so 0.7 of it is there.
    adapter = slightly_moved(low)
    part = adapter.replace(
        lora=trees.map_named(
            lambda name, leaf: leaf * (0.7 if name.endswith("_b") else 1.0), adapter.lora
        )
    )
    config = exporting.ExportConfig(
        model=low.name,
        adapter=str(save(tmp_path / "part", low, part)),
        format="merged",
        to=str(tmp_path / "to"),
        weights="float32",
    )
    exporting.run_export(config)
    merged, source = verify.read_merged(tmp_path / "to", low, part, True), find_model(low.name)
    assert verify.share_kept(merged, low, adapter, source, True) == pytest.approx(0.7, abs=0.01)
    # An adapter as training begins it moves nothing: there is no share.
    assert (
        verify.share_kept(
            merged,
            low,
            low.lm.init_adapter(jax.random.key(0), VARIANTS["plain"], low.base),
            source,
            True,
        )
        is None
    )


# In.


PEFT_CONFIGS = {
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 5},
        "alpha_pattern": {r".*\.2\.self_attn\.v_proj": 9},
    },
    "rslora": {"target_modules": ["k_proj", "o_proj"], "r": 3, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "r": 2, "use_dora": True},
    "dora-layers": {
        "target_modules": ["q_proj", "up_proj"],
        "r": 2,
        "use_dora": True,
        "layers_to_transform": [0, 3],
    },
    "layers": {"target_modules": ["q_proj"], "r": 2, "layers_to_transform": [2]},
}


def write_peft(model: Model, folder: pathlib.Path, *, head: bool, **settings: Any) -> Any:
    """A PEFT adapter with random weights, saved by PEFT; returns the torch model."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS" if head else "CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(torch_base(model.name, head=head), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted


IMPORTS = [("llama", case, False) for case in PEFT_CONFIGS] + [
    ("llama", "patterns", True),
    ("llama", "dora", True),
]
IMPORTS += [("qwen2", "all-linear", True), ("qwen2", "dora", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "case", "head"), IMPORTS, indirect=["model"])
def test_imported_adapters_give_pefts_outputs(tmp_path, model, case, head):
    adapted = write_peft(model, tmp_path / "peft", head=head, **PEFT_CONFIGS[case])
    import_peft.run_import(
        import_peft.ImportConfig(
            model=model.name, peft=str(tmp_path / "peft"), to=str(tmp_path / "artefact")
        )
    )
    adapter, record = model.load_role(tmp_path / "artefact", "reward" if head else "policy")
    np.testing.assert_allclose(
        outputs(model, adapter), torch_outputs(adapted, head=head), atol=1e-4
    )
    assert record.role == ("reward" if head else "policy")


def test_an_imported_config_keeps_what_is_even_over_layers(tmp_path, model):
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"v_proj": 2},
        "use_rslora": True,
    }
    write_peft(model, tmp_path / "peft", head=False, lora_dropout=0.1, **settings)
    adapter, _ = peft.read_peft(tmp_path / "peft", model.lm.config)
    assert adapter.config == LoRAConfig(
        rank=2, alpha=6.0, targets="q,v", ranks="q=4", rank_stabilised=True, dropout=0.1
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA'"),
        ({"bias": "all"}, "bias 'all'; only 'none' is supported"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4', which changes the base's weights",
        ),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']; only 'score'"),
        ({"use_something_new": True}, "sets use_something_new, which is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_peft_settings_that_are_not_supported_are_named(tmp_path, model, fields, message):
    write_peft(model, tmp_path / "peft", head=False, target_modules=["q_proj"], r=2)
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError) as error:
        peft.read_peft(tmp_path / "peft", model.lm.config)
    assert message in str(error.value)


def test_peft_tensors_that_do_not_fit_are_named(tmp_path, model):
    write_peft(model, tmp_path / "peft", head=False, target_modules=["q_proj"], r=2)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    good = safetensors.load_file(path)
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    for change, message in (
        (
            {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 32), np.float32)},
            "no place in this base: base_model.model.lm_head.lora_A.weight",
        ),
        (
            {
                "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": good[
                    stem + "A.weight"
                ]
            },
            "no place in this base: .*layers.9",
        ),
        (
            {stem + "B.weight": None},
            "layers.1.self_attn.q_proj has lora_a where lora_a, lora_b belong",
        ),
        (
            {stem + "A.weight": np.zeros((2, 7), np.float32)},
            r"layers.1.self_attn.q_proj has A \(7, 2\)",
        ),
    ):
        tensors = {name: array for name, array in (good | change).items() if array is not None}
        safetensors.save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            peft.read_peft(tmp_path / "peft", model.lm.config)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors is not a complete safetensors file"
    ):
        peft.read_peft(tmp_path / "peft", model.lm.config)


# Nothing is overwritten; a wrong export is not kept.


def test_a_folder_that_is_there_is_left_alone(tmp_path, model):
    artefact = save(tmp_path / "artefact", model, moved(model, VARIANTS["plain"], head=False))
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine.txt").write_text("mine")
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="exists already; give --to a folder that does not"):
            export(model, artefact, form, tmp_path / "to")
    with pytest.raises(UserError, match="exists already"):
        import_peft.run_import(
            import_peft.ImportConfig(model=model.name, peft=str(artefact), to=str(tmp_path / "to"))
        )
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_that_reads_back_differently_is_not_kept(monkeypatch, tmp_path, model, form):
    artefact = save(tmp_path / "artefact", model, moved(model, VARIANTS["plain"], head=False))
    saved = exporting.save_file
    monkeypatch.setattr(
        exporting,
        "save_file",
        lambda tensors, path, **kw: saved(
            {n: a * np.asarray(1.1, a.dtype) for n, a in tensors.items()}, path, **kw
        ),
    )
    with pytest.raises(
        UserError, match=r"does not give the same logits: they differ by .* Nothing was kept"
    ):
        export(model, artefact, form, tmp_path / "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artefact"]


# The chat template that a role was trained with.


OWN = (
    "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt "
    "%}<s>{% endif %}"
)
OTHER = (
    "{% for m in messages %}{{ 'please' if m.role == 'user' else 'thanks' }} {{ m.content }} "
    "<unk> {% endfor %}{% if add_generation_prompt %}thanks{% endif %}"
)


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> pathlib.Path:
    """A base whose tokenizer has a chat template, and beside it a file with another one."""
    root = tmp_path_factory.mktemp("templated")
    folder = write_base(root / "base")
    tokenizer = Tokenizer.load(folder)
    tokenizer.inner.chat_template = OWN
    tokenizer.save(folder)
    (root / "other.jinja").write_text(OTHER)
    return folder


def check_exported_tokenizer(
    folder: pathlib.Path, tokenizer: Tokenizer, template: str | None
) -> None:
    """transformers' own rendering of a turn has the ids that training and sampling had."""
    inner = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert inner.chat_template == template
    user = [{"role": "user", "content": "good tea"}]
    whole = [*user, {"role": "assistant", "content": "fine"}]
    ids = lambda messages, cue: list(
        inner.apply_chat_template(
            messages, add_generation_prompt=cue, tokenize=True, return_dict=False
        )
    )
    if template is None:
        assert list(inner("good tea")["input_ids"]) == tokenizer.prompt_ids("good tea")
        return
    assert ids(user, True) == tokenizer.prompt_ids("good tea")
    assert ids(whole, False) == tokenizer.prompt_ids("good tea") + tokenizer.response_ids(
        "fine"
    ) + list(tokenizer.tail_ids)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("given", ["auto", "none", "FILE"])
def test_an_export_carries_the_chat_template_that_the_role_was_trained_with(
    tmp_path, templated, given, head
):
    given = {"FILE": str(templated.parent / "other.jinja")}.get(given, given)
    model = load_model(TemplateOptions(model=str(templated), template=given))
    adapter = moved(model, VARIANTS["plain"], head=head)
    artefact = save(tmp_path / "artefact", model, adapter)
    _, record = model.load_role(artefact)
    config = exporting.ExportConfig(
        model=model.name, adapter=str(artefact), format="merged", to="-", template=given
    )
    writers = {
        "peft": exporting._write_peft,
        "merged": lambda folder, *role: exporting._write_merged(folder, config, *role),
    }
    for form, write in writers.items():
        (tmp_path / form).mkdir()
        write(tmp_path / form, model, adapter, record)
        check_exported_tokenizer(
            tmp_path / form, model.tokenizer, {"auto": OWN, "none": None}.get(given, OTHER)
        )
        classifier.read_back(tmp_path / form, model.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "merged"])
def test_the_template_is_named_to_export_and_what_is_written_is_read_back(
    monkeypatch, tmp_path, templated, form
):
    given = str(templated.parent / "other.jinja")
    model = load_model(TemplateOptions(model=str(templated), template=given))
    artefact = save(tmp_path / "artefact", model, moved(model, VARIANTS["plain"], head=False))
    settings = {
        "model": model.name,
        "adapter": str(artefact),
        "format": form,
        "to": str(tmp_path / "to"),
    }
    with pytest.raises(
        UserError,
        match=r"artefact was trained with another tokenizer or chat template than that of .*; give "
        r"the folder, the template",
    ):
        exporting.run_export(exporting.ExportConfig(**settings))
    with monkeypatch.context() as patch:
        patch.setattr(
            Tokenizer,
            "save",
            lambda self, folder: load(templated).tokenizer.inner.save_pretrained(folder),
        )
        with pytest.raises(
            UserError,
            match=r"The tokenizer that was written does not encode as the model's own\. Nothing "
            r"was "
            r"kept\.",
        ):
            exporting.run_export(exporting.ExportConfig(**settings, template=given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artefact"]
    exporting.run_export(exporting.ExportConfig(**settings, template=given))
    check_exported_tokenizer(tmp_path / "to", model.tokenizer, OTHER)


def test_a_date_that_no_template_asks_for_is_refused(templated):
    with pytest.raises(
        UserError,
        match=f"template_date is '2025-02-01', which no chat template of {templated} asks for; "
        "leave it out",
    ):
        load_model(TemplateOptions(model=str(templated), template_date="2025-02-01"))


# Averages, and the listing.


def test_an_average_is_the_weighted_sum_of_updates(tmp_path, model):
    roles = [moved(model, VARIANTS[name], head=True) for name in ("plain", "patterns", "pissa")]
    folders = [save(tmp_path / str(i), model, role) for i, role in enumerate(roles)]
    weights = (0.5, 0.2, 0.3)
    target = average.run_average(
        average.AverageConfig(
            model=model.name,
            adapters=tuple(map(str, folders)),
            weights=weights,
            to=str(tmp_path / "mean"),
        )
    )
    mean, record = model.load_role(target, "reward")
    assert (record.score_mean, record.score_std) == (0.4, 2.5)
    merged = [combine.merge(model.base, role) for role in roles]
    expected = jax.tree.map(
        lambda base, *others: (
            base + sum(w * (o - base) for w, o in zip(weights, others, strict=True))
        ),
        model.base,
        *merged,
    )
    for (name, a), b in zip(
        trees.named_leaves(combine.merge(model.base, mean)).items(),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    heads = [np.asarray(role.head["kernel"]) for role in roles]
    np.testing.assert_allclose(
        mean.head["kernel"], sum(w * h for w, h in zip(weights, heads, strict=True)), atol=1e-6
    )


def test_adapters_that_cannot_be_averaged(tmp_path, model):
    policy, reward = (
        save(tmp_path / str(head), model, moved(model, VARIANTS["plain"], head=head))
        for head in (False, True)
    )
    dora = save(tmp_path / "dora", model, moved(model, VARIANTS["dora"], head=False))
    make = lambda *adapters, weights=None: average.run_average(
        average.AverageConfig(
            model=model.name,
            adapters=tuple(map(str, adapters)),
            weights=weights,
            to=str(tmp_path / "to"),
        )
    )
    with pytest.raises(UserError, match="different roles"):
        make(policy, reward)
    with pytest.raises(UserError, match="2 adapters and 1 weights"):
        make(policy, policy, weights=(1.0,))
    with pytest.raises(UserError, match="A DoRA adapter cannot lie under"):
        make(policy, dora)
    with pytest.raises(UserError, match="must be finite"):
        make(policy, policy, weights=(1.0, float("nan")))
    with pytest.raises(UserError, match="standard deviation that is not above 0"):
        make(reward, reward, weights=(1.0, -1.0))
    with pytest.raises(UserError, match="at least one"):
        make()
    assert not (tmp_path / "to").exists()


def test_show_lists_what_an_artefact_is(tmp_path, model):
    text = show.show(
        show.ShowConfig(
            str(save(tmp_path / "artefact", model, moved(model, VARIANTS["pissa"], head=True)))
        )
    )
    for line in (
        "role           reward (with its scalar head)",
        "tuning         lora: rank 2, alpha 4.0, targets all-linear, init pissa",
        "scaling        alpha / rank",
        f"base           {model.name}, fingerprint {model.fingerprint}",
        "step           12",
        "normalisation  (raw - 0.4) / 2.5",
        'metrics        {"auc": 0.7}',
    ):
        assert re.search(rf"^{re.escape(line)}", text, re.MULTILINE), text
    assert re.search("frozen beneath .*q rank 2", text) and "MiB on disk" in text


# Heads: a classifier's padding, and values.


@pytest.fixture(scope="module")
def ends_padded(tmp_path_factory) -> tuple[Model, pathlib.Path]:
    """A model whose tokenizer pads with </s>, which every response ends in, and a reward on it."""
    root = tmp_path_factory.mktemp("ends_padded")
    folder = write_base(root / "base")
    tokenizer = load(folder).tokenizer
    tokenizer.inner.pad_token = tokenizer.inner.eos_token
    tokenizer.save(folder)
    # As older versions of transformers write it.
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "</s>", "eos_token": "</s>"})
    )
    model = load(folder)
    assert model.tokenizer.pad_id == model.tokenizer.eos_id
    return model, save(root / "artefact", model, moved(model, VARIANTS["plain"], head=True))


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_classifier_scores_a_padded_batch_as_the_reward_does(tmp_path, ends_padded, form):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, artefact = ends_padded
    done = exporting.run_export(
        exporting.ExportConfig(
            model=model.name, adapter=str(artefact), format=form, to=str(tmp_path / "to")
        )
    )
    # The obvious way: the folder's tokenizer pads, the classifier finds the ends.
    inner = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    assert (
        inner.pad_token_id not in model.tokenizer.stop_ids
        and f"pad_token_id={inner.pad_token_id}," in done.note
    )
    texts = ["<s> good tea please yes </s>", "<s> fine coffee no </s>", "<s> bad </s>"]
    batch = inner(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    assert batch["input_ids"][1, -1] == inner.pad_token_id
    kind = transformers.AutoModelForSequenceClassification
    if form == "merged":
        loaded = kind.from_pretrained(tmp_path / "to", dtype=torch.float32).eval()
    else:
        base = kind.from_pretrained(
            model.name, dtype=torch.float32, num_labels=1, pad_token_id=inner.pad_token_id
        )
        loaded = pytest.importorskip("peft").PeftModel.from_pretrained(base, tmp_path / "to").eval()
    with torch.no_grad():
        theirs = (
            loaded(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, 0]
            .numpy()
        )
    offset = json.loads((tmp_path / "to" / "perl_jax_reward.json").read_text())["offset"]
    adapter, record = model.load_role(artefact)
    for text, found in zip(texts, theirs, strict=True):
        _, *words, _ = text.split()
        ids = model.tokenizer.prompt_ids(" ".join(words[:-1])) + model.tokenizer.response_ids(
            words[-1]
        )
        score = model.lm.score(
            model.base, adapter, jnp.asarray([ids]), jnp.ones((1, len(ids)), bool)
        )
        np.testing.assert_allclose(
            found + offset, record.normalise(np.asarray(score))[0], atol=1e-4
        )
    assert f"add {offset:.6g} to the logit" in done.note and "end each text with </s>" in done.note


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("where", ["tokenizer", "both"])
def test_a_classifier_that_would_read_another_token_is_not_kept(
    monkeypatch, tmp_path, ends_padded, form, where
):
    model, artefact = ends_padded
    eos, written = model.tokenizer.eos_id, classifier.save_tokenizer
    if where == "both":
        monkeypatch.setattr(classifier, "pad_id_of", lambda tokenizer: eos)
        message = (
            r"at token 4 \('yes'\).* at its last token 5 \('</s>'\): the tokenizer pads "
            r"with id 2, the classifier's pad_token_id is 2"
        )
    else:
        monkeypatch.setattr(
            classifier,
            "save_tokenizer",
            lambda folder, tokenizer, pad_id: written(folder, tokenizer, eos),
        )
        message = (
            r"at token \d+ \('</s>'\).* at its last token 5 \('</s>'\): the tokenizer pads "
            r"with id 2, the classifier's pad_token_id is 3"
        )
    with pytest.raises(UserError, match=message):
        export(model, artefact, form, tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_padding_is_a_token_that_no_turn_ends_with():
    words = lambda: word_tokenizer(["good"])
    assert classifier.pad_id_of(words()) == 0
    # A chat template whose turn ends in <pad> and <unk>: neither the stop nor its tail may pad.
    inner = words().inner
    inner.chat_template = (
        "{% for m in messages %}<s> {{ m.content }} <pad> <unk> {% endfor %}{% "
        "if add_generation_prompt %}<s> {% endif %}"
    )
    tokenizer = Tokenizer(inner)
    assert (tokenizer.stop_part, tokenizer.tail_ids) == ((0,), (3,))
    assert classifier.pad_id_of(tokenizer) == 1
    # Neither pad, unk nor bos: another special token, one for padding before the others.
    inner = words().inner
    inner.add_special_tokens({"additional_special_tokens": ["<image>", "<right_pad>"]})
    inner.pad_token = inner.unk_token = inner.bos_token = None
    assert (
        inner.convert_ids_to_tokens(classifier.pad_id_of(Tokenizer(inner, stop_ids=(0, 1, 3))))
        == "<right_pad>"
    )
    inner = words().inner
    inner.pad_token = inner.unk_token = inner.bos_token = None
    with pytest.raises(UserError, match=r"Every special token of .* ends a turn"):
        classifier.pad_id_of(Tokenizer(inner, stop_ids=(0, 1, 3)))


def test_the_added_tokens_are_read_once_however_many_there_are(monkeypatch):
    # Each reading makes a dictionary of all of them: thousands of readings held up an export of
    # Gemma 3.
    tokenizer = word_tokenizer(["good"])
    tokenizer.inner.add_special_tokens(
        {"additional_special_tokens": [f"<unused{i}>" for i in range(30)]}
    )
    kind, reads = type(tokenizer.inner), []
    made = kind.added_tokens_decoder.fget
    monkeypatch.setattr(
        kind, "added_tokens_decoder", property(lambda inner: reads.append(1) or made(inner))
    )
    classifier.pad_id_of(tokenizer)
    assert len(reads) == 1


def test_a_value_comes_back_as_a_value(tmp_path, model):
    adapter = moved(model, VARIANTS["plain"], head=True)
    artefacts.save_artefact(tmp_path / "value", adapter, model.record("value", adapter))
    export(model, tmp_path / "value", "peft", tmp_path / "peft")
    import_peft.run_import(
        import_peft.ImportConfig(
            model=model.name, peft=str(tmp_path / "peft"), to=str(tmp_path / "again")
        )
    )
    again, record = model.load_role(tmp_path / "again", "value")
    assert record.score_mean is None
    np.testing.assert_allclose(outputs(model, again), outputs(model, adapter), atol=1e-5)


# By command, in a fresh process.


def run_commands(*lines: list[Any]) -> subprocess.CompletedProcess:
    """`perl-jax` lines one after the other in a fresh process; the largest exit status."""
    texts = [list(map(str, line)) for line in lines]
    return subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(texts)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "variant"), ALL, indirect=["model"])
def test_every_variant_goes_round_by_commands(tmp_path, model, variant):
    lines, roles = [], {}
    base = ["--model", model.name]
    for head in (False, True):
        root = tmp_path / ("reward" if head else "policy")
        roles[head] = root, moved(model, VARIANTS[variant], head=head)
        artefact = save(root / "artefact", model, roles[head][1])
        lines.append(["export", artefact, *base, "--format", "peft", "--to", root / "peft"])
        lines.append(["export", artefact, *base, "--format", "merged", "--to", root / "merged"])
        lines.append(["import", root / "peft", *base, "--to", root / "again"])
    done = run_commands(*lines)
    assert (
        done.returncode == 0 and done.stderr.count("export, read back with outputs within") == 4
    ), done.stderr[-2000:]
    for head, (root, adapter) in roles.items():
        mine = outputs(model, adapter)
        offset = (
            json.loads((root / "peft" / "perl_jax_reward.json").read_text())["offset"]
            if head
            else 0.0
        )
        mine = (mine - 0.4) / 2.5 if head else mine
        assert np.abs(mine - outputs(model, Adapter(head=adapter.head))).max() > 0.05
        for theirs in (
            torch_peft(model, root / "peft", head=head),
            torch_base(root / "merged", head=head),
        ):
            np.testing.assert_allclose(torch_outputs(theirs, head=head) + offset, mine, atol=1e-4)
        again, record = model.load_role(root / "again", "reward" if head else "policy")
        found = outputs(model, again)
        np.testing.assert_allclose(
            np.asarray(record.normalise(found)) if head else found, mine, atol=1e-4
        )


@pytest.mark.slow
def test_commands_that_are_refused_say_why(tmp_path):
    folder = write_base(tmp_path / "base")
    model = load(folder)
    artefact = save(tmp_path / "artefact", model, moved(model, VARIANTS["dora"], head=False))
    assert (
        run_commands(
            ["export", artefact, "--model", folder, "--format", "peft", "--to", tmp_path / "peft"]
        ).returncode
        == 0
    )
    again = run_commands(
        ["export", artefact, "--model", folder, "--format", "peft", "--to", tmp_path / "peft"]
    )
    assert again.returncode == 2 and "exists already" in again.stderr
    shown = run_commands(["show", artefact])
    assert shown.returncode == 0 and "dora True" in shown.stdout
