"""The entry point of the `perl-jax` command: imports it and runs it."""

from __future__ import annotations

import os
import sys


def start() -> int:
    """Runs the command of this process; returns its exit status.

    After Ctrl-C, also while modules are imported, the process ends here with status 130.
    Python's own exit would wait for threads, and print where they are interrupted.
    """
    try:
        # Imported here, because the import takes seconds in which Ctrl-C may come.
        from perl_jax.cli.main import main

        status = main()
    except KeyboardInterrupt:
        os.write(2, b"perl-jax: stopped by Ctrl-C.\n")
        status = 130
    if status == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
