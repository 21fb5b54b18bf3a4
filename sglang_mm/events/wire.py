"""What both ends of the event stream agree on: names, limits, and how sockets are bound and connected."""

import errno
from ipaddress import IPv4Address, IPv6Address, ip_address

import zmq

from sglang_mm.errors import ConfigError

ENV = "SGLANG_MM_EVENTS"  # in the environment of ranks: where they push
CONTROL_ENV = "SGLANG_MM_CONTROL"  # the same: where they tell that they live, and ask who is at fault
LOOPBACK = "127.0.0.1"
ALIVE_EVERY_S = 1.0
ANSWER_DEADLINE_S = 3.0  # of a hub, to a new subscriber
LOST_AFTER_S = 10.0  # without a sign of life from the hub
LAYERS_EVERY_S = 0.05  # of one rank, the last layer aside
MEDIA_EVERY_S = 1.0  # of one medium that is being read
BEAT_EVERY_S = 0.5
SILENT_AFTER_S = 0.6  # without a beat, from a rank that the hub called
CALL_EVERY_S = 0.05  # while a fault is looked into
CALL = b"?"  # what the hub sends to a rank that shall beat at once
ASK_WITHIN_S = 1.0  # what an error may take longer, so that it names the rank at fault
QUEUED = 1000  # messages that may wait for a hub, or for a slow subscriber
LARGEST = 1 << 20  # bytes of a message; who sends more is cut off
LONGEST_REASON = 500  # letters of an error's text
LIVE, BEATS = b"e", b"h"  # topics: of live messages, and of the steady stream of heartbeats and waits
LATE, LATE_WITH_BEATS = b"@", b"#"  # how a subscriber's own topic begins, in which it hears what it missed


def bind(socket: zmq.Socket, port: int | None, host: str = LOOPBACK) -> str:
    """Its address. host: one address of this machine, never all of them. Raises ConfigError."""
    given, allowed, remedy = f"port {port} for events", "a free port from 1 to 65535", "pass another port, or none"
    if port is not None and not 0 < port < 65536:
        raise ConfigError(given, allowed, remedy)
    try:
        is_ipv6 = _address(host).version == 6
        socket.setsockopt(zmq.IPV6, is_ipv6)
        socket.bind(f"tcp://{f'[{host}]' if is_ipv6 else host}:{'*' if port is None else port}")
    except zmq.ZMQError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise _no_host(host) from None
        raise ConfigError(f"{given} ({error.strerror})", allowed, remedy) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: zmq.Socket, address: str, given: str) -> None:
    """Raises ConfigError."""
    try:
        socket.setsockopt(zmq.IPV6, "[" in address)
        socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"{given} ({error.strerror})", "tcp://HOST:PORT", "use the hub's address") from None


def _address(host: str) -> IPv4Address | IPv6Address:
    try:
        address = ip_address(host)
    except ValueError:
        raise _no_host(host) from None
    if address.is_unspecified or address.is_multicast:
        raise _no_host(host)
    return address


def _no_host(host: str) -> ConfigError:
    allowed = "one IP address of this machine, not a name, not all of them"
    return ConfigError(f"events on host {host!r}", allowed, "name the interface that the ranks reach")
