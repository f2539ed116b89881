"""Loading a large checkpoint: host memory beyond what the devices hold.

Claim     Weights go from disk to their place in pieces: on a CPU, where the device's memory is the
          host's, the process's peak exceeds the loaded base by less than its largest tensor.
Command   python experiments/benchmarks/loading.py --gigabytes 2.2
Hardware  2 CPU cores, 24 GiB, partly shared with other work (docs/log/models.md)
Time      1 minute
Numbers   base 2,103 MiB, largest tensor 125 MiB, 117 MiB beyond base and process; 14.5 to 15.6 s
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def write_checkpoint(folder: pathlib.Path, gigabytes: float) -> None:
    """A Llama of random bfloat16 weights with as many layers as the size asks for, one file a
    layer.
    """
    width, ffn, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    narrow = width // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
    }
    shapes |= {
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * vocab * width) / layer_bytes))
    random = np.random.default_rng(0)
    draw = lambda shape: (0.02 * random.standard_normal(shape, np.float32)).astype(
        ml_dtypes.bfloat16
    )
    index: dict[str, str] = {}

    def write(number: int, tensors: dict[str, np.ndarray]) -> None:
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    write(
        0, {"model.embed_tokens.weight": draw((vocab, width)), "model.norm.weight": draw((width,))}
    )
    for layer in range(layers):
        write(
            layer + 1,
            {f"model.layers.{layer}.{name}.weight": draw(shape) for name, shape in shapes.items()},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    values = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(SHAPE | values))


def memory() -> dict[str, int]:
    """This process's resident bytes now: of its own (RssAnon) and of mapped files (RssFile)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def load(folder: pathlib.Path) -> None:
    """Loads the checkpoint in this process and prints what it took."""
    import jax

    from perl_jax.hub import config_json, weights
    from perl_jax.runtime import trees

    # Libraries are imported as they are first used; what they take is the process's, not the
    # loading's.
    jax.block_until_ready(jax.numpy.zeros(1))
    config = config_json.read_config(folder, dtype="bfloat16", param_dtype="bfloat16")
    before, peak, done = memory(), {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            now = memory()
            peak.update({name: max(value, now[name]) for name, value in peak.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    base = jax.block_until_ready(weights.load_base(folder, config))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    held = trees.size_bytes(base)
    largest = max(
        2 * int(np.prod(stored.shape)) for stored in weights.stored_tensors(folder).values()
    )
    mib = lambda count: f"{count / 2**20:,.0f} MiB"
    print(f"base on the device                   {mib(held)}")
    print(f"largest tensor                       {mib(largest)}")
    print(
        f"process before loading               {mib(before['RssAnon'])} of its own, "
        f"{mib(before['RssFile'])} of files"
    )
    print(
        f"largest while loading                {mib(peak['RssAnon'])} of its own, "
        f"{mib(peak['RssFile'])} of files"
    )
    print(f"beyond base and process              {mib(peak['RssAnon'] - before['RssAnon'] - held)}")
    print(f"peak resident, the kernel's account  {mib(memory()['VmHWM'])}")
    print(f"seconds                              {seconds:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        load(arguments.folder)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder), arguments.gigabytes)
        # A process of its own, so that writing does not count.
        return subprocess.run(
            [sys.executable, __file__, "--folder", folder], check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
