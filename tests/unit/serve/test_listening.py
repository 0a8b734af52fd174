"""Sockets at configured addresses."""

from __future__ import annotations

import socket

import pytest

from kvatlas.errors import ConfigError
from kvatlas.netloc import netloc
from kvatlas.serve.listening import bind


def test_a_port_that_is_listened_on_is_refused_by_its_settings_name() -> None:
    with bind("api", "127.0.0.1", 0, listen=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"proxy\.port: cannot listen on 127\.0\.0\.1:{port}: .*in use.*0 for any"):
            bind("proxy", "127.0.0.1", port)


def test_a_port_is_shared_by_those_who_all_ask_for_it() -> None:
    with bind("proxy", "127.0.0.1", 0, reuse_port=True) as one:
        port = one.getsockname()[1]
        with bind("proxy", "127.0.0.1", port, reuse_port=True) as other:
            assert other.getsockname() == one.getsockname()


def test_a_bound_socket_takes_no_connections_unless_asked_to() -> None:
    with bind("proxy", "127.0.0.1", 0) as quiet, socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(quiet.getsockname())
    with bind("proxy", "127.0.0.1", 0, listen=True) as listening, socket.socket() as client:
        client.connect(listening.getsockname())


def test_a_host_that_is_no_address_is_refused_by_its_settings_name() -> None:
    with pytest.raises(ConfigError, match=r"api\.host: 'no address' is no address"):
        bind("api", "no address", 0)


@pytest.mark.parametrize(("host", "written"), [("10.0.0.7", "10.0.0.7:80"), ("llama-0", "llama-0:80"), ("::1", "[::1]:80")])
def test_ipv6_addresses_get_brackets(host: str, written: str) -> None:
    assert netloc(host, 80) == written
