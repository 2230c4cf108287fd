"""Whether Ray says that a cluster has an autoscaler: what it keeps of ones that have, and of one built by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import cloudpickle
import psutil
import pytest

from prefect_slo import RayPool
from prefect_slo.resources import Size
from prefect_slo.runner.backends.cluster import ClusterBackend
from prefect_slo.runner.backends.protocol import Bundle, Finished, Opened, Outcome, Progress
from prefect_slo.runner.backends.ray_autoscaler import names_its_nodes, names_its_types

ray = pytest.importorskip("ray")

LIMIT_S = 120.0
HEAD = "5a1f00" + 50 * "c"


@pytest.mark.parametrize(
    ("report", "scales"),
    [
        ({"active_nodes": {"ray.head.default": 1}, "node_type_mapping": {HEAD: "ray.head.default"}}, True),
        ({"active_nodes": {}, "node_type_mapping": {HEAD: "ray.head.default"}}, True),
        ({"active_nodes": {f"node_{HEAD}": 1}, "node_type_mapping": {HEAD: f"node_{HEAD}"}}, False),
        ({"active_nodes": {"node_cpu": 1, "node_pool_a": 2}}, True),
        ({"active_nodes": {"node_cafe": 1}}, True),
        ({"active_nodes": {}, "node_type_mapping": None}, False),
        (None, False),
    ],
)
def test_the_first_autoscaler_is_known_by_the_types_of_its_nodes(report: Any, scales: bool) -> None:
    assert names_its_types({"autoscaler_report": report}) is scales


@pytest.mark.parametrize(
    ("instance", "version", "scales"), [("i-0a1b", "2", True), ("", "2", False), ("i-0a1b", "0", False)]
)
def test_the_second_autoscaler_is_known_by_its_report_and_its_instances(
    instance: str, version: str, scales: bool
) -> None:
    from ray.autoscaler.v2.schema import ClusterStatus, NodeInfo, Stats

    node = NodeInfo("", f"node_{HEAD}", instance, "127.0.0.1", "IDLE", HEAD)
    assert names_its_nodes(ClusterStatus(idle_nodes=[node], stats=Stats(autoscaler_version=version))) is scales


class Once:
    """A program that does nothing with each item."""

    def open(self, emit: Any) -> Any:
        return lambda item, payload: Outcome(payload)


@pytest.fixture
def small_head() -> Iterator[str]:
    """The address of a cluster of one CPU with an autoscaler that adds nodes of four, on this machine."""
    port, other = _free_ports()
    address, place = f"{ray.util.get_node_ip_address()}:{port}", Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    sized = {"node_config": {}, "min_workers": 0, "max_workers": 1}
    config = {
        "cluster_name": "small", "max_workers": 1, "idle_timeout_minutes": 1, "upscaling_speed": 1.0, "docker": {},
        "provider": {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True}, "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**sized, "resources": {"CPU": 1}, "max_workers": 0},
            "large": {**sized, "resources": {"CPU": 4}},
        },
        "file_mounts": {}, "cluster_synced_files": [],
        **{f"{who}{what}_commands": [] for who, what in (
            ("", "initialization"), ("", "setup"), ("head_", "setup"), ("worker_", "setup"),
            ("head_", "start_ray"), ("worker_", "start_ray"),
        )},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    told = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
            f"--temp-dir={place}", f"--autoscaling-config={place / 'config.json'}", "--include-dashboard=false",
            "--disable-usage-stats", f"--ray-client-server-port={other}",
        ],
        env={**os.environ, **told}, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield address
    finally:
        _end_all(head, place)


def _free_ports() -> tuple[int, int]:
    with closing(socket.socket()) as one, closing(socket.socket()) as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def _end_all(head: subprocess.Popen[bytes], place: Path) -> None:
    """End a cluster's processes, which are in sessions of their own: all that were told its folder."""
    ours = [one for one in psutil.process_iter(["cmdline"]) if str(place) in " ".join(one.info["cmdline"] or ())]
    for process in ours:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(ours, timeout=LIMIT_S)
    head.wait()
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_a_size_that_no_node_has_is_waited_for_where_an_autoscaler_brings_a_node(small_head: str) -> None:
    """A real head, and a real autoscaler that starts nodes on this machine."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    deadline = time.monotonic() + LIMIT_S
    while True:
        said: list[str] = []
        pool = RayPool(small_head, capped=False)
        backend = ClusterBackend(pool._cluster(said.append), {}, "run", notice=said.append)
        reports: SimpleQueue[Any] = SimpleQueue()
        backend.open(1, Size(4, 512), reports.put)
        opened = reports.get(timeout=LIMIT_S)
        if isinstance(opened, Opened):
            break
        backend.shutdown()  # the head starts, or its autoscaler has not reported yet
        assert time.monotonic() < deadline, opened
    assert said == [
        "No Ray node has CPU=4 (the most: 1). Bundles wait for the cluster's autoscaler to bring one; "
        "`ray status` says whether it can."
    ]
    backend.submit(1, Bundle(1, "once", cloudpickle.dumps(Once()), ((1, b""),)))
    while isinstance(ended := reports.get(timeout=LIMIT_S), Progress):
        pass
    assert isinstance(ended, Finished), ended
    assert ended.on_new
    backend.shutdown()
