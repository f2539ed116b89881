"""HTTP requests whose reply is bounded in time and in size, from the connection to the last byte.

A time-out of a socket bounds each read, so a server that sends one byte a second could hold a
request for ever. Here each operation gets what is left of the time of the whole request, and each
read looks whether the request is still wanted.
"""

from __future__ import annotations

import functools
import http.client
import queue
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from perl_jax.runtime.stopping import LOOK_SECONDS

LARGEST_REPLY = 8 * 2**20  # bytes of a reply's body
_LARGEST_HEAD = 2**18  # bytes of its headers, and of what chunks add
_PIECE = 2**16  # bytes that are read at a time


class Late(TimeoutError):
    """The time for the request is over."""


class Cancelled(Exception):
    """The reply is not wanted any more."""


class TooLarge(Exception):
    """The reply has more bytes than a request may have."""


class Budget:
    """What one request may take: time, and bytes received.

    Args:
        seconds: The time from now to the last byte of the reply.
        stop: Set when the reply is not wanted any more.
    """

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self._latest = time.monotonic() + seconds
        self._bytes = LARGEST_REPLY + _LARGEST_HEAD
        self._stop = stop

    def left(self) -> float:
        """Returns the seconds that are left; raises Late or Cancelled if the request has ended."""
        if self._stop.is_set():
            raise Cancelled
        seconds = self._latest - time.monotonic()
        if seconds <= 0:
            raise Late
        return seconds

    def look(self) -> float:
        """Returns how many seconds an operation may last before `left` is called again."""
        return min(LOOK_SECONDS, self.left())

    def receive(self, count: int) -> None:
        """Counts received bytes; raises TooLarge if they are too many."""
        self._bytes -= count
        if self._bytes < 0:
            raise TooLarge


def _receive(sock: Any, receive: Callable[[], int]) -> int:
    """Returns the number of bytes that a socket with a budget received, and counts them.

    Args:
        sock: The socket.
        receive: Receives into a buffer within the socket's time-out.
    """
    while True:
        sock.settimeout(sock.budget.look())
        try:
            count = receive()
        except TimeoutError:
            continue  # `look` raises when the time is over
        sock.budget.receive(count)
        return count


class _Socket(socket.socket):
    """A TCP socket.

    Attributes:
        budget: The budget of the request that the socket belongs to.
    """

    budget: Budget

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        """Receives into a buffer and returns the number of bytes, as sockets do."""
        return _receive(self, functools.partial(super().recv_into, *arguments, **named))

    def sendall(self, *arguments: Any) -> None:
        """Sends all bytes, as sockets do."""
        self.settimeout(self.budget.left())
        super().sendall(*arguments)


class _TLSSocket(ssl.SSLSocket):
    """A TLS socket.

    Attributes:
        budget: The budget of the request that the socket belongs to.
    """

    budget: Budget

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        """Receives into a buffer and returns the number of bytes, as sockets do."""
        return _receive(self, functools.partial(super().recv_into, *arguments, **named))

    def send(self, *arguments: Any) -> int:
        """Sends bytes and returns how many were sent; `sendall` calls this method."""
        self.settimeout(self.budget.left())
        return super().send(*arguments)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Returns the settings of TLS connections: certificates are verified."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = _TLSSocket
    return context


def _addresses(host: str, port: int, budget: Budget) -> list[tuple]:
    """Returns what `socket.getaddrinfo` returns for a host.

    Asks in a thread, because the system's resolver has no time-out.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            found.put(error)

    threading.Thread(target=look_up, name=f"look up {host}", daemon=True).start()
    while True:
        try:
            answer = found.get(timeout=budget.look())
        except queue.Empty:
            continue
        if isinstance(answer, Exception):
            raise answer
        return answer


def _connect(budget: Budget, address: tuple[str, int], *_: object) -> socket.socket:
    """Returns a socket that is connected to the first address of a host that answers.

    Each address gets an equal part of the time that is left. Raises OSError if none answers.

    Args:
        budget: The budget of the request.
        address: (host, port).
    """
    places = _addresses(*address, budget)
    failure = OSError(f"{address[0]} has no address")
    for number, (family, kind, protocol, _name, place) in enumerate(places):
        sock = _Socket(family, kind, protocol)
        sock.budget = budget
        try:
            sock.settimeout(budget.left() / (len(places) - number))
            sock.connect(place)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
    raise failure


class _Connection(http.client.HTTPConnection):
    """An HTTP connection that keeps to a request's budget of time and bytes."""

    _tunnel_host: str | None  # the server, if a proxy is between

    def __init__(self, host: str, *, budget: Budget, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._budget = budget
        self._create_connection = functools.partial(_connect, budget)


class _TLSConnection(_Connection):
    """An HTTPS connection that keeps to a request's budget of time and bytes."""

    default_port = 443

    def connect(self) -> None:
        """Connects, and makes the TLS handshake in the time that is left."""
        super().connect()
        self.sock.settimeout(self._budget.left())
        host = self._tunnel_host or self.host
        sock: Any = _tls().wrap_socket(self.sock, server_hostname=host)
        sock.budget = self._budget
        self.sock = sock


class _Handler(urllib.request.HTTPHandler):
    """Opens http addresses by connections that keep to a request's budget."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    def http_open(self, req: urllib.request.Request) -> Any:
        """Returns the response to a request."""
        connection: Any = _Connection
        return self.do_open(connection, req, budget=self._budget)


class _TLSHandler(urllib.request.HTTPSHandler):
    """Opens https addresses by connections that keep to a request's budget."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    def https_open(self, req: urllib.request.Request) -> Any:
        """Returns the response to a request."""
        connection: Any = _TLSConnection
        return self.do_open(connection, req, budget=self._budget)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host and turn POST into GET."""

    def redirect_request(self, *arguments: Any) -> None:
        """Returns None, which urllib takes for a refusal."""


def send(request: urllib.request.Request, budget: Budget) -> bytes:
    """Sends a request, through the proxy that the environment names, and returns the reply's body.

    Redirects are refused, and a compressed body is not unpacked.

    Args:
        request: The request.
        budget: The time and the bytes for it.

    Raises:
        urllib.error.HTTPError: The status is not 2xx; `beginning` reads the body.
        TooLarge: The reply is too large.
        Cancelled: The reply is not wanted any more.
        OSError, http.client.HTTPException, ValueError: The connection failed, the time is over
            (Late, or an error with Late as its `reason`), or the reply is not HTTP.
    """
    opener = urllib.request.build_opener(_Handler(budget), _TLSHandler(budget), _NoRedirects)
    with opener.open(request) as reply:
        if reply.length is not None and reply.length > LARGEST_REPLY:
            raise TooLarge
        pieces, count = [], 0
        while piece := reply.read(_PIECE):
            pieces.append(piece)
            count += len(piece)
            if count > LARGEST_REPLY:
                raise TooLarge
        if reply.length:  # what the header promised and the server did not send
            raise http.client.IncompleteRead(b"", reply.length)
        return b"".join(pieces)


def beginning(reply: Any, count: int) -> bytes:
    """Returns up to `count` bytes of a reply's body, or those that came before it failed."""
    pieces = []
    try:
        while count > 0 and (piece := reply.read(min(count, _PIECE))):
            pieces.append(piece)
            count -= len(piece)
    except (OSError, http.client.HTTPException, ValueError, TooLarge):
        pass
    return b"".join(pieces)
