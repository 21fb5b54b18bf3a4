"""The server's port, taken before minutes of loading and kept until SGLang's HTTP server listens on it.

SGLang binds its port last. If another process has taken it meanwhile, its own start-up request goes to that process,
and it hangs, or says that it is ready. A socket that is bound and does not listen keeps others out, and refuses whoever
connects.
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_mm.errors import ConfigError

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # `localhost` has an IPv6 address where there is no IPv6


@contextmanager
def kept(host: str, port: int, server_class: type | None) -> Iterator[list[socket.socket]]:
    """Bound sockets, one per address of `host`, closed afterwards. Raises ConfigError when the port is in use.

    server_class: uvicorn's Server, which inside listens on these sockets instead of binding its own. None, for a server
    that cannot: the port is only looked at.
    """
    ours: list[socket.socket] = []
    try:
        _bind_all(ours, host, port)
        if server_class is None:
            _close(ours)
            yield []
        else:
            with _served_by(server_class, ours):
                yield ours
    finally:
        _close(ours)


def _bind_all(ours: list[socket.socket], host: str, port: int) -> None:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for number, (family, _, protocol, _, address) in enumerate(dict.fromkeys(found), 1):
            try:
                ours.append(_bound(family, protocol, address))
            except OSError as error:
                if error.errno not in NOT_HERE or (number == len(found) and not ours):
                    raise
    except OSError as error:
        raise ConfigError(f"--port {port} on {host} ({error.strerror})", "a free port", "pass another --port") from None


def _bound(family: int, protocol: int, address: tuple) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections of an earlier server do not count
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # others that set it could bind beside us
    except OSError:
        made.close()
        raise
    return made


def _close(sockets: list[socket.socket]) -> None:
    for made in sockets:
        made.close()


@contextmanager
def _served_by(server_class: type, ours: list[socket.socket]) -> Iterator[None]:
    serve = server_class.serve

    async def serve_on_ours(server, sockets=None):
        for made in ours:  # listening counts past connections again
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await serve(server, sockets=sockets or ours)

    server_class.serve = serve_on_ours
    try:
        yield
    finally:
        server_class.serve = serve
