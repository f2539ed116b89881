"""Every file of a model, an artefact and a PEFT adapter, made odd: a sentence or a good result, in
bounded time; nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from perl_jax.errors import UserError
from perl_jax.generation.text import generate
from perl_jax.hub import artefacts, config_json, peft, weights
from perl_jax.hub.families import FAMILIES
from perl_jax.hub.model import Model, ModelOptions, described, load_model
from perl_jax.hub.peft_settings import check_settings
from perl_jax.hub.tokenizer import train_bpe
from perl_jax.models.language_model import LanguageModel
from perl_jax.runtime import json_values
from tests import odd_files
from tests.small import CONFIG, make_adapter, make_base

# The longest that one file may take, on a busy machine, and the longest sentence.
SECONDS, CHARACTERS = 30.0, 3000
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@dataclasses.dataclass(frozen=True)
class Folders:
    """A model's folder, one with an index, an artefact and a PEFT folder, and the model."""

    model: Model
    whole: pathlib.Path
    parts: pathlib.Path
    artefact: pathlib.Path
    adapter: pathlib.Path

    def read_whole(self) -> None:
        """Reads the folder with one file of weights, and encodes with its tokenizer."""
        read_model(self.whole)

    def read_parts(self) -> None:
        """Reads the folder with an index."""
        read_model(self.parts)

    def read_artefact(self) -> None:
        """Reads the artefact as every command does."""
        self.model.load_role(self.artefact, "reward")
        artefacts.content_of(self.artefact)
        artefacts.read_record(self.artefact).normalise(1.0)

    def read_adapter(self) -> None:
        """Reads the PEFT folder."""
        peft.read_peft(self.adapter, self.model.lm.config)


def read_model(folder: pathlib.Path) -> None:
    """Reads all of a model's folder."""
    lm, tokenizer = described(ModelOptions(model=str(folder)), folder)
    weights.load_base(folder, lm.config)
    weights.sampled_content(folder)
    tokenizer.prompt_ids("a b")
    tokenizer.response_ids("c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("odd")
    whole, parts, artefact, adapter = (root / name for name in ("whole", "parts", "role", "peft"))
    config = dataclasses.replace(CONFIG, vocab_size=300)
    lm = LanguageModel(config)
    tokenizer = train_bpe(["a b c d e f"], 300)
    tokenizer.inner.chat_template = TEMPLATE
    weights.save_base(whole, config, make_base(lm), tokenizer.token_ids())
    tokenizer.save(whole)
    (whole / "generation_config.json").write_text('{"eos_token_id": [2, 0], "bos_token_id": 1}')
    shutil.copytree(whole, parts)
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    names = sorted(tensors)
    placed = {name: f"model-{1 + (name > names[9])}.safetensors" for name in names}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in names if placed[name] == file}, parts / file)
    few = {names[0]: placed[names[0]], names[-1]: placed[names[-1]]}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": few}))
    model = load_model(str(whole))
    role = make_adapter(lm)
    record = model.record("reward", role, score_mean=0.5, score_std=1.5, metrics={"a": 1.0})
    artefacts.save_artefact(artefact, role, record)
    values, tensors = peft.to_peft(role, config, str(whole))
    values |= {"alpha_pattern": {"self_attn.q_proj": 4.0}, "rank_pattern": {"q_proj": 5}}
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    (adapter / "perl_jax_reward.json").write_text('{"offset": 0.5, "role": "reward"}')
    save_file(tensors, adapter / "adapter_model.safetensors")
    return Folders(model, whole, parts, artefact, adapter)


FILES = {
    "config.json": ("whole", Folders.read_whole),
    "generation_config.json": ("whole", Folders.read_whole),
    "tokenizer_config.json": ("whole", Folders.read_whole),
    "tokenizer.json": ("whole", Folders.read_whole),
    "chat_template.jinja": ("whole", Folders.read_whole),
    "model.safetensors": ("whole", Folders.read_whole),
    "model.safetensors.index.json": ("parts", Folders.read_parts),
    "model-1.safetensors": ("parts", Folders.read_parts),
    "artefact.json": ("artefact", Folders.read_artefact),
    "adapter_config.json": ("adapter", Folders.read_adapter),
    "adapter_model.safetensors": ("adapter", Folders.read_adapter),
    "perl_jax_reward.json": ("adapter", Folders.read_adapter),
}


def trials_of(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The odd forms of a file; records also with a valid checksum, so that fields are read."""
    yield from odd_files.odd_files(path)
    if path.name == "artefact.json":
        values = json.loads(path.read_bytes())
        values.pop("checksum")
        for what, changed in odd_files.odd_fields(values):
            text = json.dumps(json_values.with_checksum(changed)).encode()
            yield f"with a checksum, {what}", lambda text=text: odd_files.put(path, text)


def problems_of(
    path: pathlib.Path, read: Callable[[], None], most: int | None, seed: int = 0
) -> tuple[list[str], dict[str, int]]:
    """What is neither a good result nor a sentence, and how often each of these was.

    Args:
        path: The file, which is as it was afterwards.
        read: Reads what the file belongs to.
        most: The number of trials, drawn with the seed; None: all.
        seed: Seed of the draw.
    """
    kept, counts, problems = path.read_bytes(), {"good": 0, "sentence": 0}, []
    trials = list(trials_of(path))
    if most is not None and most < len(trials):
        trials = random.Random(seed).sample(trials, most)
    try:
        for what, make in trials:
            make()
            begin = time.monotonic()
            try:
                read()
                counts["good"] += 1
            except UserError as error:
                counts["sentence"] += 1
                if len(str(error)) > CHARACTERS or "\n" in str(error):
                    problems.append(f"{what}: a message of {len(str(error))} characters")
            except BaseException as error:
                problems.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            if time.monotonic() - begin > SECONDS:
                problems.append(f"{what}: took {time.monotonic() - begin:.0f} s")
    finally:
        odd_files.put(path, kept)
    return problems, counts


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "most",
    [6, pytest.param(40, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.exhaustive)],
)
def test_an_odd_file_is_a_sentence_or_read_as_it_is(folders, name, most):
    where, read = FILES[name]
    problems, counts = problems_of(vars(folders)[where] / name, lambda: read(folders), most)
    assert not problems, "\n".join(problems)
    assert counts["sentence"] > 0


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_never_opened(folders, name):
    where, read = FILES[name]
    path = vars(folders)[where] / name
    kept = path.read_bytes()
    try:
        for what in ("a named pipe", "a device", "a folder", "a socket"):
            odd_files.clear(path)
            dict(odd_files.odd_kinds())[what](path)
            with pytest.raises(UserError):
                read(folders)
    finally:
        odd_files.put(path, kept)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; it must be at most 10000."),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be at most 16777216."),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number greater than 0."),
        ({"hidden_size": -1}, "hidden_size is -1; it must be a whole number greater than 0."),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"num_attention_heads": 5}, "(32) is not a multiple of the number of attention heads (5)"),
        ({"num_key_value_heads": 3}, "model.heads is 4; it must be a multiple of model.kv_heads"),
        ({"model_type": ["llama"]}, "has model_type ['llama']; supported: llama"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false."),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object."),
    ],
)
def test_a_config_says_which_field_is_wrong(folders, fields, message):
    raw = json.loads((folders.whole / "config.json").read_text())
    with pytest.raises(UserError) as error:
        config_json.from_json(raw | fields, "config.json")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "llama"])
@pytest.mark.parametrize("most", [100, pytest.param(None, marks=pytest.mark.exhaustive)])
def test_a_field_of_any_family_is_a_sentence_or_read(kind, most):
    made = {name: value for name, value in AutoConfig.for_model(kind).to_dict().items() if value}
    raw = {"model_type": kind, "vocab_size": 100, **made, "num_hidden_layers": 4}
    raw |= {name: raw[name][:4] for name in ("layer_types", "no_rope_layers") if name in raw}
    config_json.from_json(raw, "config.json")
    trials = list(odd_files.odd_fields(raw))
    longest = slowest = 0.0
    for _, changed in random.Random(1).sample(trials, most or len(trials)):
        begin = time.monotonic()
        try:
            config_json.from_json(changed, "config.json")
        except UserError as error:
            longest = max(longest, len(str(error)))
        slowest = max(slowest, time.monotonic() - begin)
    assert 0 < longest < CHARACTERS
    assert slowest < SECONDS


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", 3, None, ["a"], "", ".", "y" * 300])
def test_an_index_names_files_of_its_folder(folders, file):
    path = folders.parts / "model.safetensors.index.json"
    kept = path.read_bytes()
    try:
        path.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(UserError, match="each value must be the name of a file in the same"):
            weights.stored_tensors(folders.parts)
    finally:
        path.write_bytes(kept)


@pytest.mark.parametrize(
    "pattern",
    ["(((a+)+)+)+$", "([a-z_.0-9]+)+X", ".*.*.*.*.*.*.*.*X", "(a?){40}a{40}", "(", "x" * 1000],
)
def test_a_pattern_that_could_take_for_ever_is_refused(folders, pattern):
    values = json.loads((folders.adapter / "adapter_config.json").read_text())
    with pytest.raises(UserError, match="alpha_pattern has"):
        check_settings(values | {"alpha_pattern": {pattern: 4.0}})
    check_settings(values | {"alpha_pattern": {r"^model\.layers\.(0|1)\..*q_proj": 4.0}})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(folders, tmp_path, value):
    tensors = load_file(folders.whole / "model.safetensors")
    broken = shutil.copytree(folders.whole, tmp_path / "broken")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight holds NaN or infinity"):
        load_model(str(broken))
    role = make_adapter(folders.model.lm)
    role.lora["layers"]["attention"]["q"]["lora_a"] = (
        role.lora["layers"]["attention"]["q"]["lora_a"].at[0, 0, 0].set(value)
    )
    artefacts.save_artefact(
        tmp_path / "role",
        role,
        folders.model.record("reward", role, score_mean=0.5, score_std=1.5),
    )
    with pytest.raises(UserError, match=r"role holds NaN or infinity: .*q/lora_a"):
        folders.model.load_role(tmp_path / "role")
    tensors = load_file(folders.adapter / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name][0, 0] = value
    adapter = shutil.copytree(folders.adapter, tmp_path / "peft")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity; the file is damaged"):
        peft.read_peft(adapter, folders.model.lm.config)


def test_every_kind_of_damage_is_tried(folders):
    found = [
        what
        for what, _ in itertools.islice(odd_files.odd_files(folders.whole / "config.json"), 700)
    ]
    assert len(found) > 500 and len(set(found)) > 480
    assert {"a named pipe", "64 GiB of zeros", "vocab_size = 1000000000000"} <= set(found)


@pytest.mark.slow
def test_outputs_that_are_not_finite_are_no_text(folders, tmp_path):
    tensors = load_file(folders.whole / "model.safetensors")
    huge = shutil.copytree(folders.whole, tmp_path / "huge")
    for name in tensors:
        if "up_proj" in name or "down_proj" in name:
            tensors[name] = np.sign(tensors[name]) * np.float32(1e20)
    save_file(tensors, huge / "model.safetensors")
    with pytest.raises(UserError, match=r"2 of 2 responses .* are NaN or infinite"):
        generate(load_model(str(huge)), None, ["a b"], samples=2, max_new_tokens=4)
    assert len(generate(folders.model, None, ["a b"], samples=2, max_new_tokens=4)) == 2
