"""Messages of Orbax's storage errors, and comparison of restored leaves with saved digests."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from perl_jax.runtime import trees
from perl_jax.types import Tree

# Largest number of characters of a storage error in a message (`short_message`).
_SAID = 300


def short_message(error: BaseException) -> str:
    """Returns the first line of a storage error, cut to 300 characters, without its settings.

    An error without text gives the name of its class.
    """
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    return (line if len(line) <= _SAID else f"{line[:_SAID]} ...") or type(error).__name__


def hide_unretrieved_errors() -> None:
    """Stops asyncio from logging the errors of a checkpoint's other reads after one failed."""
    logging.getLogger("asyncio").addFilter(_retrieved)


def _retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def changed_leaves(tree: Tree, saved: Mapping[str, str]) -> list[str]:
    """Returns the names of leaves whose content differs from saved digests, sorted.

    Args:
        tree: The tree of arrays.
        saved: The digests, keyed by path (`trees.digests`). A leaf without a digest counts as
            changed.
    """
    return sorted(name for name, text in trees.digests(tree).items() if saved.get(name) != text)
