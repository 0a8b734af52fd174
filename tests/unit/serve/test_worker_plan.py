"""What workers run, which settings they cannot share, and when one that died is started again."""

from __future__ import annotations

import pytest

from kvatlas.config import Config, load_config
from kvatlas.config.layers import Secret
from kvatlas.errors import ConfigError
from kvatlas.serve.workers.plan import RESTART_S_MAX, check, plan_of, read_plan, restart_in_s, write_plan
from kvatlas.serve.workers.worker import Worker


def config(*overrides: str) -> Config:
    return load_config(environ={}, overrides=['route.frontDoors=["proxy"]', "route.workers=3", *overrides])


def test_workers_share_the_proxys_port_and_have_ports_of_their_own_for_the_api() -> None:
    plans = [plan_of(config("api.port=9000"), Worker(number, 3), 7000, "/run/w").config for number in range(3)]
    assert [(one.proxy.port, one.proxy.reuse_port) for one in plans] == [(7000, True)] * 3
    assert [one.api.port for one in plans] == [9000, 9001, 9002]
    assert [one.api.grpc_port for one in plans] == [50051, 50052, 50053]
    assert not any(one.zmq.bind for one in plans)


def test_a_free_api_port_stays_a_free_one() -> None:
    assert plan_of(config("api.port=0"), Worker(2, 3), 7000, "/run/w").config.api.port == 0


def test_every_worker_hears_all_others_and_those_of_other_replicas() -> None:
    shared = config('route.peers=["tcp://b:5580"]', 'route.peersListen=["tcp://*:5580", "ipc:///run/kvatlas"]')
    route = plan_of(shared, Worker(1, 3), 7000, "/run/w").config.route
    assert route.peers == ("ipc:///run/w/0", "ipc:///run/w/2", "tcp://b:5580", "tcp://b:5581", "tcp://b:5582")
    assert route.peers_listen == ("ipc:///run/w/1", "tcp://*:5581", "ipc:///run/kvatlas.1")


def test_workers_tell_where_all_their_apis_are_unless_each_took_a_free_port() -> None:
    worker = Worker(1, 3, first_api_port=8080)
    assert worker.headers == {"x-kvatlas-worker": "1 of 3", "x-kvatlas-api-ports": "8080 8081 8082"}
    assert Worker(1, 3).headers == {"x-kvatlas-worker": "1 of 3"}


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (('route.frontDoors=["proxy", "ext-proc"]',), "route.workers"),
        (('zmq.engines=[{"endpoint": "tcp://10.0.0.7:5557"}]', "zmq.bind=true"), "zmq.bind"),
        (("api.port=65534",), "api.port"),
        (("api.grpcPort=65535",), "api.grpcPort"),
        (('route.peers=["tcp://b:65534"]',), "route.peers"),
        (('route.peersListen=["tcp://*:65534"]',), "route.peersListen"),
    ],
)
def test_settings_that_workers_cannot_share_are_refused(overrides: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config(*overrides))
    assert caught.value.path == field


def test_a_worker_that_goes_on_dying_is_started_ever_more_rarely_up_to_a_bound() -> None:
    waits = [restart_in_s(failures) for failures in range(1, 100)]
    assert waits[0] > 0
    assert waits == sorted(waits)
    assert waits[-1] == RESTART_S_MAX


def test_a_plan_comes_to_a_worker_as_it_was_made_secrets_included() -> None:
    overrides = ('route.frontDoors=["proxy"]', "proxy.token=secret", "route.objectives={batch: -1}", "models={x: y}")
    config = load_config(environ={}, overrides=overrides)
    plan = plan_of(config, Worker(1, 2), 8000, "/run/kvatlas")
    again = read_plan(write_plan(plan))
    assert again == plan
    assert isinstance(again.config.proxy.token, Secret)
    assert "secret" not in repr(again)
