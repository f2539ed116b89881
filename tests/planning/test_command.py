"""Plans of a small model: every job, what is in the memory, what crosses links, refusals and
errors.
"""

from __future__ import annotations

import collections
import json

import jax
import pytest

from perl_jax.adapters.quantise import QuantiseConfig
from perl_jax.cli import main
from perl_jax.errors import UserError
from perl_jax.hub.presets import model_config
from perl_jax.models.language_model import LanguageModel
from perl_jax.objectives.algorithms import AlgorithmConfig
from perl_jax.planning import command, measure, search, text
from perl_jax.planning.config import JOBS, READING, PlanConfig
from perl_jax.planning.jobs import plan_job, planned_model
from perl_jax.planning.known import planned_for
from perl_jax.planning.measure import Measured
from perl_jax.runtime import trees
from perl_jax.runtime.sharding import MeshConfig
from tests import small
from tests.rollouts import Rehearsal, even_base, placed_model, prompts, rl_config

GENERATIONS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1")
LAYERS, WIDTH, FFN, VOCABULARY = 3, 256, 512, 1024
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MATRICES = LAYERS * (4 * WIDTH * 256 + 3 * WIDTH * FFN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("planned")
    (path / "config.json").write_text(json.dumps(LLAMA))
    return str(path)


def config(folder: str, **fields) -> PlanConfig:
    return PlanConfig(
        **{
            "job": "sft",
            "model": folder,
            "topology": "v5e:2x2",
            "batch": 16,
            "prompt_length": 96,
            "response_length": 32,
            **fields,
        }
    )


def learn(plan: command.Plan) -> measure.Measured:
    return next(program for program in plan.programs if program.name == "learn")


@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("sft", ["learn", "validate"]),
        ("reward", ["learn", "validate", "score"]),
        ("dpo", ["reference", "learn", "validate", "implicit"]),
        ("rl", ["sample", "reward", "logprobs", "assemble", "learn"]),
    ],
)
def test_every_job_on_a_slice(folder, job, names):
    pytest.importorskip("libtpu")
    found = command.plan(config(folder, job=job))
    assert [program.name for program in found.of("step", "measure")] == names and found.fits
    starts = [program.name for program in found.of("start")]
    assert list(dict.fromkeys(starts)) == ["place", "fingerprint", "begin", "checksums"]
    # The matrices of q, k, v have one shape and place, as those of gate and up; o, down, two
    # vectors and the embedding have others.
    assert starts.count("place") == starts.count("fingerprint") == 7
    # Matrices over four devices; 2 vectors a layer and one more on each.
    base = 2 * ((MATRICES + VOCABULARY * WIDTH) // 4 + (2 * LAYERS + 1) * WIDTH)
    assert {program.memory["base"] for program in found.programs} == {base}
    assert (
        found.peak
        == max(sum(program.memory.values()) for program in found.programs)
        == found.largest.peak
    )
    assert found.link_bytes == sum(program.account.link_bytes for program in found.of("step"))
    # Three passes (with what is computed again) over 128 tokens of a batch, products of weights and
    # activations alone.
    rows = 16 * (2 if job in ("reward", "dpo") else 1)
    # Of the last layer a score needs its last token alone, behind its keys and values.
    needed = MATRICES * (LAYERS - 1) / LAYERS if job == "reward" else MATRICES
    assert learn(found).flops > 3 * 2 * needed * rows * 128


@pytest.mark.slow
@pytest.mark.parametrize("topology", GENERATIONS)
@pytest.mark.parametrize("job", [*JOBS, *READING])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_every_job_on_every_generation(folder, job, topology, tuning):
    pytest.importorskip("libtpu")
    found = command.plan(
        config(folder, job=job, topology=topology, tuning=tuning, mesh="fsdp=2,tensor=2")
    )
    assert found.fits and {program.name for program in found.programs} <= planned_for(job)


def test_only_gradients_of_adapters_cross_links(folder):
    pytest.importorskip("libtpu")
    found = learn(command.plan(config(folder, mesh="data=4"), only="learn"))
    adapters = LAYERS * 8 * 4 * (WIDTH + 256)
    assert {c.kind for c in found.account.collectives} == {"all-reduce"}
    sent = sum(c.result_bytes for c in found.account.collectives)
    # In float32 under bfloat16 activations; then the loss and its weight.
    assert 4 * adapters <= sent <= 4 * adapters + 4096


@pytest.mark.slow
def test_gradients_of_split_weights_go_straight_to_their_parts(tmp_path):
    pytest.importorskip("libtpu")
    # Large enough for the compiler: small matrices it sums whole on every device, whatever it is
    # told.
    width, ffn, layers = 1024, 4096, 2
    wide = {
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | wide))
    found = learn(command.plan(config(str(tmp_path), tuning="full"), only="learn"))
    sent = collections.Counter()
    for collective in found.account.collectives:
        sent[collective.kind] += collective.link_bytes
    matrices = layers * (4 * width * width + 3 * width * ffn)
    # Of sums that every device has whole there are those of norms, the loss and rows of the
    # embedding.
    assert sent["all-reduce"] < 0.05 * 2 * 0.75 * 4 * matrices
    # Sums of parts are in float32, as reduce-scatters or as rings of permutes (which may go all the
    # way round).
    assert (
        0.75 * 4 * matrices
        <= sent["reduce-scatter"] + sent["collective-permute"]
        <= 4 * 1.25 * (matrices + VOCABULARY * width)
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_split_weights_are_gathered_each_time_they_are_read(folder, remat):
    pytest.importorskip("libtpu")
    found = learn(command.plan(config(folder, remat=remat), only="learn"))
    gathered = sum(c.result_bytes for c in found.account.collectives if c.kind == "all-gather")
    # Forwards, and once more for the backward pass: kept for it, all layers would be there at once.
    # Ids and masks besides.
    assert 2 * 2 * MATRICES <= gathered <= 1.2 * 2 * 2 * MATRICES


@pytest.mark.parametrize("minibatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_planned_is_what_runs(minibatches):
    """The arguments of a real update's programs: shapes, dtypes, places."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    lm = small.changed(layers=2, vocab_size=64)
    real = placed_model(lm, even_base(lm), mesh, jax.devices())
    adapter = lm.init_adapter(jax.random.key(0), small.LORA)
    settings = rl_config(lora=small.LORA, algorithm=AlgorithmConfig(minibatches=minibatches))
    run = Rehearsal(real, adapter, adapter.replace(head=small.make_head(lm)), settings)
    run.step(prompts(lm))
    model = planned_model(real.lm, "planned", QuantiseConfig(), shard_adapters=False)
    ran = run.programs.by_name()
    pieces = [piece for piece in plan_job(model, settings).pieces if piece.name in ran]
    assert [piece.name for piece in pieces] == ["sample", "reward", "logprobs", "assemble", "learn"]
    for piece in pieces:
        ((_structure, leaves),) = ran[piece.name].signatures
        planned, _planned_structure = jax.tree.flatten(piece.args)
        assert len(planned) == len(leaves), piece.name
        for mine, (shape, dtype, place) in zip(planned, leaves, strict=True):
            assert (mine.shape, mine.dtype) == (shape, dtype), piece.name
            assert place is None or mine.sharding.is_equivalent_to(place, len(shape)), (
                piece.name,
                shape,
                mine.sharding,
                place,
            )


@pytest.mark.slow
def test_a_job_that_the_compiler_refuses(tmp_path):
    pytest.importorskip("libtpu")
    large = LLAMA | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(large))
    found = command.plan(config(str(tmp_path), tuning="full", topology="v5e:1x1", batch=2))
    weights = 4 * trees.count(LanguageModel(model_config(str(tmp_path))).abstract_base())
    assert not found.fits and found.peak > weights > found.usable
    said = text.describe(found)
    assert (
        "The compiler refused learn: it asked for" in said
        and "trained roles" in said
        and "it does not fit." in said
    )
    assert (
        json.loads(json.dumps(command.as_json(found)))["programs"][0]["refused"]["asked"]
        > found.usable
    )


@pytest.mark.slow
def test_a_search_lists_what_fits_best_first(folder):
    pytest.importorskip("libtpu")
    plans = search.search(config(folder))
    assert (
        all(plan.fits for plan in plans)
        and len({plan.config.mesh for plan in plans}) == len(plans) == 6
    )
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    # Little work on many weights: the fewer are gathered the better.
    assert plans[0].mesh["tensor"] == 1
    assert text.describe_search(plans).count(
        "\n"
    ) == 7 and "No layout fits." in text.describe_search([])


def test_the_page_names_the_largest_of_each_program_and_of_all():
    def program(name, of, phase, **memory):
        return Measured(
            name,
            {"base": 2**30, **{part: int(size * 2**30) for part, size in memory.items()}},
            0,
            None,
            1.0,
            0,
            None,
            phase,
            of,
        )

    programs = (
        program("learn", "", "step", batch=0.5, temporaries=1),
        program("place", "layers/mlp/gate/kernel", "start", batch=0.25),
        program("place", "outer/embedding", "start", batch=0.5, temporaries=0.25),
        program("begin", "", "start", temporaries=2),
    )
    found = command.Plan(
        PlanConfig(job="sft", model="gemma2-2b", topology="v5e:2x2"),
        {"data": 1, "fsdp": 4, "tensor": 1},
        2**34,
        programs,
    )
    said = text.describe(found)
    assert (
        found.largest is programs[3]
        and "Peak 3.00 GiB a device (begin) of 16.00 usable: it fits." in said
    )
    lines = [line.split() for line in said.splitlines()]
    assert ["place", "2", "outer/embedding", "0.75", "1.75"] in lines and [
        "begin",
        "1",
        "all",
        "2.00",
        "3.00",
    ] in lines
    assert ["peak", "2.50"] in lines


def test_the_command_prints_and_writes(folder, tmp_path, capsys):
    pytest.importorskip("libtpu")
    path = tmp_path / "plan.json"
    arguments = [
        "plan",
        "--job",
        "sft",
        "--model",
        folder,
        "--topology",
        "v5e:2x2",
        "--mesh",
        "data=2,fsdp=2",
        "--batch",
        "16",
    ]
    assert (
        main.main(
            [*arguments, "--prompt-length", "96", "--response-length", "32", "--json", str(path)]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads(path.read_text())
    assert (
        "usable: it fits." in said
        and f"sft of {folder} on v5e:2x2 (data=2, fsdp=2, tensor=1)" in said
    )
    assert "Loading, first values and checkpoints" in said and {
        "place",
        "fingerprint",
        "checksums",
    } <= {program["name"] for program in found["programs"]}
    assert found["fits"] and found["peak_bytes_per_chip"] == max(
        program["peak_bytes"] for program in found["programs"]
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mesh": "fsdp:4"}, "mesh is 'fsdp:4'; write it as data=2,fsdp=4,tensor=2."),
        ({"mesh": "fsdp=2", "search": True}, "search tries meshes; leave mesh out, or search."),
        (
            {"job": "sft", "algorithm": AlgorithmConfig("rloo")},
            "algorithm.* is for the job rl; job is 'sft': leave it out.",
        ),
        ({"microbatches": 3}, "microbatches is 3; it must divide batch_size, 16."),
        (
            {"job": "evaluate", "microbatches": 2},
            "microbatches is 2, which evaluate does not read; leave it out (sft, reward, dpo, rl "
            "read it).",
        ),
    ],
)
def test_settings_that_cannot_be(folder, fields, words):
    with pytest.raises(UserError) as error:
        config(folder, **fields)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mesh": "fsdp=3"}, "mesh data=-1, fsdp=3, tensor=1 does not fill 4 devices."),
        (
            {"batch": 6},
            "batch / microbatches is 6 rows; it must be a multiple of the mesh's data x fsdp = 4.",
        ),
        ({"prompt_length": 500}, "prompt_length + response_length is 532;"),
        ({"topology": "v5e:2"}, "'v5e:2' names no TPU slice"),
        ({"model": "gemma9"}, "it must be a folder with a config.json or one of gemma2-2b,"),
    ],
)
def test_plans_that_cannot_be(folder, fields, words):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError) as error:
        command.prepare(config(folder, **fields))
    assert words in str(error.value)


def test_adapters_can_be_split():
    whole, split = (_adapter_bytes(adapters) for adapters in ("replicated", "sharded"))
    assert split < 0.6 * whole


def _adapter_bytes(adapters: str) -> int:
    lm = small.changed(layers=2, vocab_size=64)
    model = placed_model(
        lm, even_base(lm), MeshConfig(data=1, fsdp=4, tensor=2, adapters=adapters), jax.devices()
    )
    planned = plan_job(model, rl_config(lora=small.LORA))
    return planned.resident_bytes()["trained roles"]
