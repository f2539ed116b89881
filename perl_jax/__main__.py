"""`python -m perl_jax` is the `perl-jax` command."""

import sys

from perl_jax.cli.start import start

if __name__ == "__main__":
    sys.exit(start())
