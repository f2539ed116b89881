"""`python -m perl_jax` is the `perl-jax` command."""

import sys

from perl_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
