"""Makes the notebook from its source: `python -m tests.notebook` writes perl_jax.ipynb."""

from __future__ import annotations

import pathlib

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "notebook"
SOURCE, NOTEBOOK = FOLDER / "perl_jax.py", FOLDER / "perl_jax.ipynb"


def made() -> nbformat.NotebookNode:
    """The notebook that the source makes: no outputs, and cells that are named by their numbers."""
    found = jupytext.read(SOURCE)
    kernel = found.metadata["kernelspec"]
    found.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}, "accelerator": "TPU"}
    )
    found.nbformat, found.nbformat_minor = 4, 5
    for number, cell in enumerate(found.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = nbformat.from_dict({})
    nbformat.validate(found)
    return found


def main() -> None:
    """Writes the notebook."""
    NOTEBOOK.write_text(nbformat.writes(made()) + "\n", encoding="utf-8")
    print(NOTEBOOK)


if __name__ == "__main__":
    main()
