"""The notebook is what its source makes, and runs from first cell to last on a tiny model."""

from __future__ import annotations

import gzip
import json
import os
import pathlib

import pytest

pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
from tests import notebook  # noqa: E402

SHORT = {
    "train": 24,
    "held_out": 16,
    "prompt": 16,
    "response": 8,
    "sft_steps": 2,
    "reward_steps": 2,
    "rl_steps": 2,
    "batch_size": 8,
}


def test_the_notebook_is_made_of_its_source():
    found = notebook.NOTEBOOK.read_text(encoding="utf-8")
    assert found == notebook.nbformat.writes(notebook.made()) + "\n", "run `make notebook`"
    kinds = [cell.cell_type for cell in notebook.made().cells]
    assert kinds[0] == "markdown" and kinds.count("code") >= 8


def write_rows(path: pathlib.Path) -> None:
    """Dialogues like those of the file that the notebook downloads; two are not kept."""
    human, assistant = "\n\nHuman: ", "\n\nAssistant: "
    words = ("tea", "coffee", "milk", "latte")
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        for i in range(44):
            start = f"{human}number {i}{assistant}"
            chosen, rejected = f" {words[i % 4]} please", f" {words[(i + 1) % 4]} " * (1 + i % 5)
            if i == 3:
                start += f"tea{human}number 5{assistant}"
            if i == 4:
                rejected = " tea" * 51
            lines.write(json.dumps({"chosen": start + chosen, "rejected": start + rejected}) + "\n")


@pytest.mark.exhaustive
def test_the_notebook_runs(base, tmp_path):
    write_rows(tmp_path / "rows.jsonl.gz")
    settings = SHORT | {"model": base, "rows": str(tmp_path / "rows.jsonl.gz")}
    found = notebook.made()
    client = nbclient.NotebookClient(
        found, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    root = str(pathlib.Path(notebook.__file__).parents[1])
    # One device, and no connection to a hub.
    environment = os.environ | {
        "PERL_JAX_NOTEBOOK": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    client.execute(env=environment)
    outputs = [output for cell in found.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "42 comparisons, of which 24 are trained on" in printed
    assert "tuned_adapter:" in printed and "Traceback" not in printed
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == 1
    (table,) = (data["text/html"] for data in shown if "text/html" in data)
    assert table.count("<tr>") == 5 and table.count("brief:") == 8
    # One line a job, redrawn until it was done.
    lines = [data["text/plain"] for data in shown if data["text/plain"].startswith("\u2588")]
    for job in ("sft 2/2 (100%)", "reward 2/2 (100%)", "rl 2/2 (100%)"):
        assert sum(job in line for line in lines) == 1
    # Not one line a step on standard error, as in a log.
    assert "sft 1/2" not in printed
