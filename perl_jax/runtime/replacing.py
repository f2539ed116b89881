"""Asks for consent before a folder or file is replaced; `--overwrite` gives the consent."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from perl_jax.errors import Occupied
from perl_jax.runtime.files import PathLike

# Is called with the path of what is to be replaced; raises UserError if it must stay.
Consent = Callable[[PathLike], None]
_consent: contextvars.ContextVar[Consent | None] = contextvars.ContextVar("consent", default=None)


@contextlib.contextmanager
def replacing(consent: Consent) -> Iterator[None]:
    """Context manager in which occupied paths are replaced, if `consent` allows it.

    Args:
        consent: Called with the path of what is to be replaced, before anything is deleted; raises
            UserError if it must stay.
    """
    token = _consent.set(consent)
    try:
        yield
    finally:
        _consent.reset(token)


def require_consent(message: str, path: PathLike) -> None:
    """Returns if an occupied path may be replaced (`replacing`).

    The caller deletes what is there when the new content is complete, or when a run's first step is
    about to be made: a command that is refused for another reason deletes nothing.

    Args:
        message: What is said if it may not be replaced.
        path: The folder or file.

    Raises:
        Occupied: Outside `replacing`.
        UserError: What is there must stay.
    """
    consent = _consent.get()
    if consent is None:
        raise Occupied(message, path)
    consent(path)
