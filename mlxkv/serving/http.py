"""The socket that the server listens on."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from mlxkv.errors import InputError

log = logging.getLogger("mlxkv.serving")


class Listener(ThreadingHTTPServer):
    """A listening socket: it takes connections, one thread each, once `serve_forever` is called.

    Parameters
    ----------
    host, port
        Where it listens; port 0 takes a free one.
    handler
        Makes the handler of a connection, as http.server calls it.

    Raises
    ------
    InputError
        When it cannot listen there.
    """

    request_queue_size = 128  # connections that wait: Python's 5 are too few where many clients begin at once
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: Callable[..., Any]) -> None:
        if not 0 <= port < 2**16:  # which getaddrinfo would take for another one
            raise InputError(f"port {port} is none: there are 0 to 65535")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, handler)  # type: ignore[arg-type]
        except OSError as error:
            hint = f"is port {port} taken? --port takes another" if error.errno else ""
            raise InputError(f"cannot listen on {host} port {port}: {error}", hint) from None

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def is_private(self) -> bool:
        """Whether this machine alone can reach it."""
        return ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line why a connection ended.

        Parameters
        ----------
        request
            The socket.
        client_address
            The other end.
        """
        error = sys.exc_info()[1]
        if isinstance(error, ConnectionError | TimeoutError):
            log.info("%s hung up", client_address[0])
        else:
            log.warning("%s was not answered: %s: %s", client_address[0], type(error).__name__, error)
            log.debug("", exc_info=error)
