"""The port is ours from the first check on, and the server listens on what was bound."""

import asyncio
import socket
import threading
import time

import pytest
import requests
import uvicorn

from sglang_mm.errors import ConfigError
from sglang_mm.serving import port

HOST = "127.0.0.1"


@pytest.fixture
def free() -> int:
    with socket.create_server((HOST, 0)) as made:
        return made.getsockname()[1]


def test_nobody_else_gets_it_and_who_connects_is_refused(free):
    with port.kept(HOST, free, uvicorn.Server):
        for reuse in (0, 1):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                other.bind((HOST, free))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, free), timeout=5)
    with socket.create_server((HOST, free)):
        pass


@pytest.mark.parametrize("server_class", [None, uvicorn.Server])
def test_a_port_in_use_is_told(free, server_class):
    told = pytest.raises(ConfigError, match=f"--port {free} on {HOST} .Address already in use.*pass another --port")
    with socket.create_server((HOST, free)), told, port.kept(HOST, free, server_class):
        pass


def test_a_server_that_binds_itself_finds_it_free(free):
    with port.kept(HOST, free, None), socket.create_server((HOST, free)):
        pass


def test_a_host_that_is_none(free):
    told = pytest.raises(ConfigError, match=r"--port .* on no.such.host.invalid")
    with told, port.kept("no.such.host.invalid", free, None):
        pass


@pytest.fixture
def left(free) -> int:
    """A port on which a server has just ended that closed its connections first."""
    with socket.create_server((HOST, free)) as listening:
        client = socket.create_connection((HOST, free), timeout=5)
        served, _ = listening.accept()
        served.close()
        client.close()
    return free


def test_uvicorn_listens_where_a_server_has_just_ended(left):
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, left))
    test_uvicorn_listens_on_the_socket_that_was_bound(left, HOST)


@pytest.mark.parametrize("host", [HOST, "localhost"])
def test_uvicorn_listens_on_the_socket_that_was_bound(free, host):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})

    before = uvicorn.Server.serve
    with port.kept(host, free, uvicorn.Server):
        server = uvicorn.Server(uvicorn.Config(app, host=host, port=free, lifespan="off", log_level="error"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
        thread.start()
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.02)
        try:
            assert requests.get(f"http://{host}:{free}", timeout=10).text == "here"
        finally:
            server.should_exit = True
            thread.join(20)
    assert uvicorn.Server.serve is before
