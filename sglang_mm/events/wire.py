"""What both ends of the event stream agree on: names, limits, and how sockets are bound and connected."""

import zmq

from sglang_mm.errors import ConfigError

ENV = "SGLANG_MM_EVENTS"  # in the environment of ranks: where they push
HOST = "127.0.0.1"
ALIVE_EVERY_S = 1.0
ANSWER_DEADLINE_S = 3.0  # of a hub, to a new subscriber
LOST_AFTER_S = 10.0  # without a sign of life from the hub
LAYERS_EVERY_S = 0.05  # of one rank, the last layer aside
MEDIA_EVERY_S = 1.0  # of one medium that is being read
QUEUED = 1000  # messages that may wait for a hub, or for a slow subscriber
LARGEST = 1 << 20  # bytes of a message; who sends more is cut off
LIVE = b"e"  # the topic of live messages; what a late subscriber missed comes under a topic of its own


def bind(socket: zmq.Socket, port: int | None) -> str:
    given, allowed, remedy = f"port {port} for events", "a free port from 1 to 65535", "pass another port, or none"
    if port is not None and not 0 < port < 65536:
        raise ConfigError(given, allowed, remedy)
    try:
        socket.bind(f"tcp://{HOST}:{'*' if port is None else port}")
    except zmq.ZMQError as error:
        raise ConfigError(f"{given} ({error.strerror})", allowed, remedy) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: zmq.Socket, address: str, given: str) -> None:
    try:
        socket.connect(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"{given} ({error.strerror})", "tcp://127.0.0.1:PORT", "use the hub's address") from None
