"""`python -m tests.campaign`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.campaign.bench import Bench, Fault
from tests.campaign.commands import running_commands
from tests.campaign.kinds import KINDS


def campaign(
    root: Path, kinds: Sequence[str], trials: int, seed: int, say=print
) -> dict[str, list[int]]:
    """Runs trials of each kind; returns [trials, ended well, refused, faults] by kind.

    Args:
        root: A folder for everything.
        kinds: Keys of `KINDS`.
        trials: The number of trials of each kind; trial i has the seed `seed + i`.
        seed: The first seed.
        say: Prints a line.
    """
    counts = {kind: [0, 0, 0, 0] for kind in kinds}
    with running_commands(root / "printed") as commands:
        bench = Bench(root, commands)
        for kind in kinds:
            for number in range(seed, seed + trials):
                bench.begin(number)
                begin = time.monotonic()
                try:
                    ended = KINDS[kind](bench)
                except Fault as fault:
                    ended = "fault"
                    again = f"python -m tests.campaign --only '{kind}' --seed {number} --trials 1"
                    say(f"FAULT {kind}, seed {number}: {fault}\n  {again}")
                counts[kind][0] += 1
                counts[kind][("well", "refused", "fault").index(ended) + 1] += 1
                say(f"{kind}, seed {number}: {ended}, {time.monotonic() - begin:.0f} s")
    return counts


def table(counts: dict[str, list[int]]) -> str:
    """Returns the table of a campaign's counts."""
    head = f"{'kind':<14}{'trials':>8}{'ended well':>12}{'refused in a sentence':>23}{'faults':>8}"
    lines = [head]
    for kind, (trials, well, refused, faults) in counts.items():
        lines.append(f"{kind:<14}{trials:>8}{well:>12}{refused:>23}{faults:>8}")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(f"{'all':<14}{total[0]:>8}{total[1]:>12}{total[2]:>23}{total[3]:>8}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a campaign; returns 1 if it found a fault, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--trials", type=int, default=10, help="trials of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind (repeatable)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="perl_jax_campaign_") as folder:
        counts = campaign(
            Path(folder),
            options.only or list(KINDS),
            options.trials,
            options.seed,
            say=lambda line: print(line, flush=True),
        )
    print(table(counts))
    return int(any(faults for *_, faults in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
