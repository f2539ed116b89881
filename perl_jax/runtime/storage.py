"""What Orbax's storage says when it fails, and which leaves it changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from perl_jax.runtime import trees
from perl_jax.types import Tree

# Characters of an error of the storage in a message.
_SAID = 300


def first_line(error: BaseException) -> str:
    """What storage says, without its settings, which are a page."""
    line = str(error).strip().partition("\n")[0].partition(" [tensorstore_spec")[0]
    return (line if len(line) <= _SAID else f"{line[:_SAID]} ...") or type(error).__name__


def say_once() -> None:
    """Keeps asyncio from showing, much later, what the other reads of a checkpoint failed of
    too.
    """
    logging.getLogger("asyncio").addFilter(_retrieved)


def _retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def changed_leaves(tree: Tree, saved: Mapping[str, str]) -> list[str]:
    """Names of leaves whose content is not that of the saved digests (`trees.digests`)."""
    return sorted(name for name, text in trees.digests(tree).items() if saved.get(name) != text)
