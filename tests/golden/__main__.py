"""`make golden`: runs the golden jobs and writes their metrics; with `--check` compares them digit
by digit instead.

The test allows for other processors' rounding; a move of code that must not change anything is held
to every digit.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile

import tests.conftest  # noqa: F401  sets what JAX reads when it is imported
from tests.golden import runs


def main() -> int:
    """Returns 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with what was kept, exactly, and write nothing",
    )
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        found = runs.run_all(pathlib.Path(folder))
    if check:
        lines = runs.differences(found, runs.read_file(), 0.0)
        print("\n".join(lines) or f"Every number of {', '.join(found)} is the one that was kept.")
        return 1 if lines else 0
    runs.FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{runs.FILE} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
