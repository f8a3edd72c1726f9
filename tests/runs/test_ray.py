"""Chunks on a real Ray cluster of two nodes on this machine: the same bytes as locally, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raftune.engines.ray import passed_variables
from raftune.errors import ConfigError, DataError, EngineError
from raftune.runtime.run import resume, run
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree
from tests.runs.test_workers import (
    REPOSITORY,
    Orders,
    alone,  # noqa: F401, a fixture
    generate_events,
    orders,  # noqa: F401, a fixture
    settings,
    starts_of_chunks,
    wait_until,
    without_workers,
)

pytestmark = pytest.mark.slow
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False, "node_ip_address": "127.0.0.1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # listen on 127.0.0.1
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "5e" * 32)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        for _ in range(2):
            cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


@pytest.fixture(autouse=True)
def nodes_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def on_ray(root: Path, cluster: Any, **engine: Any) -> Any:
    engine = {"kind": "ray", "address": cluster.address, **engine}
    return tiny.config(root, **settings(2, engine=engine))


def test_two_actors_write_the_same_bytes_even_when_one_is_killed(
    tmp_path: Path,
    cluster: Any,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root = tmp_path / "run"
    orders(kill_once=[0])
    run(on_ray(root, cluster), tiny.objects())
    assert starts_of_chunks(tmp_path) == {0: 2, 1: 1, 2: 1, 3: 1}
    assert difference(alone, without_workers(tree(root))) == ""
    assert sorted(generate_events(root)) == [0, 1, 2, 3]
    assert len(list((root / "tmp").glob("worker-*.log"))) == 2


def test_errors_time_limits_and_retries_are_those_of_local_workers(
    tmp_path: Path,
    cluster: Any,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root = tmp_path / "run"
    orders(refuse_always=[2])
    with pytest.raises(DataError, match=r"^chunk 2 cannot be generated$"):
        run(on_ray(root, cluster), tiny.objects())
    orders(kill_always=[1])
    with pytest.raises(
        EngineError, match=r"chunk 1 of generate of round 1 failed 2 times: its worker process was lost"
    ):
        run(on_ray(root, cluster, max_retries=1), tiny.objects())
    orders(hang_once=[0, 1, 2, 3])
    run(on_ray(root, cluster, chunk_timeout=1), tiny.objects())
    assert difference(alone, without_workers(tree(root))) == ""


def test_a_killed_node_costs_no_more_than_its_chunk_in_flight(
    tmp_path: Path,
    cluster: Any,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root, gate = tmp_path / "run", tmp_path / "gate"
    orders(gate=str(gate))
    thread = threading.Thread(target=lambda: run(on_ray(root, cluster), tiny.objects()))
    thread.start()
    wait_until(lambda: len(starts_of_chunks(tmp_path)) == 2, 60)
    node = next(iter(cluster.worker_nodes))
    actors = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)  # SIGKILL of its raylet
    assert psutil.wait_procs(actors, timeout=30)[1] == []
    gate.touch()
    thread.join(100)
    assert sum(starts_of_chunks(tmp_path).values()) == 5
    assert difference(alone, without_workers(tree(root))) == ""
    cluster.add_node(**NODE)


def test_a_killed_driver_is_resumed_to_the_same_bytes(
    tmp_path: Path,
    cluster: Any,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root, gate = tmp_path / "run", tmp_path / "gate"
    orders(gate=str(gate))
    script = f"""
        from raftune.config import RunConfig
        from raftune.runtime.run import run
        from tests.runs import tiny
        run(RunConfig.model_validate_json({on_ray(root, cluster).model_dump_json()!r}), tiny.objects())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(starts_of_chunks(tmp_path)) == 2, 60)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    gate.touch()  # actors that are not gone yet go on, and must not publish
    resume(root, tiny.objects())
    assert difference(alone, without_workers(tree(root))) == ""
    assert driver.stdout is not None
    assert driver.stdout.read() == "", "Ray is quiet"
    driver.stdout.close()


def test_a_cluster_that_a_run_starts_for_itself_listens_on_this_machine_only(tmp_path: Path) -> None:
    script = """
        import json, signal, sys
        from pathlib import Path
        import psutil
        from raftune.config.run import EngineConfig
        from raftune.engines.ray import RayCluster
        from raftune.errors import ConfigError
        handler = signal.getsignal(signal.SIGTERM)
        cluster = RayCluster(EngineConfig(kind="ray", address="local", workers=3), Path(sys.argv[1]))
        notes = cluster.open()
        children = psutil.Process().children(recursive=True)
        listening = [c.laddr.ip for p in children for c in p.net_connections() if c.status == "LISTEN"]
        pages = [words for p in children if "dashboard.py" in (words := " ".join(p.cmdline()))]
        kept = signal.getsignal(signal.SIGTERM) is handler
        try:
            RayCluster(EngineConfig(kind="ray", resources={"GPU": 1}), Path(sys.argv[1])).open()
        except ConfigError as error:
            words = str(error)
        cluster.close()
        print(json.dumps([notes, listening, kept, words, [p for p in pages if "--disable-frontend" not in p]]))
        left = [p.cmdline() for p in psutil.wait_procs(children, timeout=10)[1]]
        assert not left, left
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    notes, listening, kept, words, dashboards = json.loads(done.stdout)
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert (notes, kept, dashboards) == ([], True, [])
    assert words.startswith("engine.resources must fit on a node of the Ray cluster; got {CPU: 1, GPU: 1}, and")


def test_a_cluster_with_less_room_than_workers_is_noted_and_used(
    tmp_path: Path,
    cluster: Any,
    alone: dict[str, str],  # noqa: F811
) -> None:
    notes: list[str] = []
    config = on_ray(tmp_path / "run", cluster, workers=4)
    observe = lambda kind, facts: notes.extend(facts["notes"] if kind == "chunk" else ())  # noqa: E731
    run(config, tiny.objects(), observe=observe)
    assert notes == ["the Ray cluster has room for 2 of 4 workers with {CPU: 1}"]
    assert difference(alone, without_workers(tree(tmp_path / "run"))) == ""


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "no connection to the Ray cluster at '127.0.0.1:9': .*refused. Start it"),
        ("nowhere", "must be auto, local or HOST:PORT; got 'nowhere'"),
        ("ray://head:10001", "must be that of the cluster itself; got 'ray://head:10001', a Ray Client's"),
    ],
)
def test_an_address_without_a_cluster_is_named(tmp_path: Path, address: str, message: str) -> None:
    config = tiny.config(tmp_path / "run", **settings(2, engine={"kind": "ray", "address": address}))
    with pytest.raises((EngineError, ConfigError), match=f"engine.address.*{message}"):
        run(config, tiny.objects())
    assert RunFolder(tmp_path / "run").is_committed(0, "model")  # what was done before is kept


def test_a_wrong_token_is_named(tmp_path: Path, cluster: Any) -> None:
    script = """
        import sys
        from pathlib import Path
        from raftune.config.run import EngineConfig
        from raftune.engines.ray import RayCluster
        from raftune.errors import EngineError
        try:
            RayCluster(EngineConfig(kind="ray", address=sys.argv[1]), Path(".")).open()
        except EngineError as error:
            print(error)
    """
    environment = {**os.environ, "RAY_AUTH_TOKEN": "a1" * 32}
    command = [sys.executable, "-c", textwrap.dedent(script), cluster.address]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
    assert "token" in done.stdout and done.stdout.startswith("engine.address: no connection to the Ray cluster at"), (
        done
    )


def test_actors_get_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"HF_HOME": "/models", "RAFTUNE_TEST_ORDERS": "{}", "PYTHONPATH": str(REPOSITORY)}
    for name, value in {**passed, "HF_TOKEN": "0123456789", "OPENAI_API_KEY": "0123456789", "OTHER": "1"}.items():
        monkeypatch.setenv(name, value)
    variables = passed_variables()
    assert variables.items() >= passed.items()
    assert not {"HF_TOKEN", "OPENAI_API_KEY", "OTHER"} & variables.keys()
