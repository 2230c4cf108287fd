"""GPU containers: Prefect's own Docker worker, told by our job variables, against a Docker engine on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkPool as PrefectPool
from prefect.utilities.templating import apply_values
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration

from prefect_slo import WorkPool
from prefect_slo.cli import main
from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.resources import Size
from prefect_slo.runner.workpool.docker_engine import devices_of, probe
from prefect_slo.runner.workpool.sizing import checked, job_variables
from prefect_slo.testing.docker import DockerEngine, serving

LOOK = "printenv NVIDIA_VISIBLE_DEVICES"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Iterator[DockerEngine]:
    with serving(DockerEngine(gpus=("GPU-a", "GPU-b"))) as served:
        monkeypatch.setenv("DOCKER_HOST", served.url)
        yield served


def told(size: Size, **given: Any) -> dict[str, Any]:
    """Job variables on a pool with the template that the Docker worker itself comes with."""
    pool = PrefectPool(name="gpus", type="docker", base_job_template=DockerWorker.get_default_base_job_template())
    return job_variables(checked(pool, None, (size,), given), size, given=given)


def started(variables: dict[str, Any]) -> Any:
    """A container as the worker makes it of job variables: created, started, waited for."""
    template = DockerWorker.get_default_base_job_template()["job_configuration"]
    values = {
        "image": "job:latest",
        "image_pull_policy": "Never",
        "command": LOOK,
        "env": {},
        "labels": {},
        **variables,
    }
    made = apply_values(template, values, remove_notset=True)
    configuration = DockerWorkerJobConfiguration(**{"name": "job", "networks": [], "volumes": [], **made})
    worker = DockerWorker(work_pool_name="gpus")
    container, _ = worker._create_and_start_container(configuration)
    container.wait()
    return container


def test_the_workers_own_template_takes_device_requests(engine: DockerEngine) -> None:
    started(told(Size(1.5, 2048, gpu=1)))
    (container,) = engine.containers.values()
    host = container.body["HostConfig"]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["NanoCpus"] == 1_500_000_000
    assert host["Memory"] == 2048 * 2**20


def test_a_container_without_a_gpu_sees_none(engine: DockerEngine) -> None:
    assert started(told(Size(1, 1024))).logs().split() == [b"void"]
    (container,) = engine.containers.values()
    assert not container.body["HostConfig"].get("DeviceRequests")


def test_containers_that_ask_by_number_are_all_given_the_first_device(engine: DockerEngine) -> None:
    """Why one pool for each device: no engine sees to it that containers side by side have different ones."""
    seen = [started(told(Size(1, 1024, gpu=1))).logs().split() for _ in range(2)]
    assert seen == [[b"GPU-a"], [b"GPU-a"]]


@pytest.mark.parametrize(("name", "seen"), [("0", b"GPU-a"), ("1", b"GPU-b"), ("GPU-b", b"GPU-b")])
def test_a_pool_of_one_device_sees_that_one_alone(engine: DockerEngine, name: str, seen: bytes) -> None:
    assert started(told(Size(1, 1024, gpu=1), **devices_of([name]))).logs().split() == [seen]


def test_a_device_that_is_not_there_is_an_error_of_the_job(engine: DockerEngine) -> None:
    with pytest.raises(Exception, match="unknown device"):
        started(told(Size(1, 1024, gpu=1), **devices_of(["7"])))


def test_an_engine_without_gpus_refuses_to_start_and_says_so_when_asked(
    engine: DockerEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.gpus = ()
    with pytest.raises(Exception, match="could not select device driver"):
        started(told(Size(1, 1024, gpu=1)))
    assert not probe().nvidia
    assert main(["gpus", "--docker", engine.url]) == 0
    assert "24.0.7 have no GPUs" in " ".join(capsys.readouterr().out.split())


def test_an_engine_with_gpus_says_so(engine: DockerEngine) -> None:
    found = probe()
    assert (found.version, found.nvidia, found.devices) == ("24.0.7", True, ())


def test_where_no_engine_answers_the_error_says_what_to_do(tmp_path: Any) -> None:
    with pytest.raises(SloError, match=r"DOCKER_HOST=tcp://"):
        probe(f"unix://{tmp_path}/none.sock")
    with pytest.raises(InvalidValue, match="unix:///path"):
        probe("ssh://somewhere")


@pytest.mark.parametrize(("gpu", "known", "said"), [(1, False, True), (1, True, False), (0, False, False)])
def test_the_log_says_where_nobody_was_asked_for_gpus(
    engine: DockerEngine, tmp_path: Any, caplog: pytest.LogCaptureFixture, gpu: float, known: bool, said: bool
) -> None:
    with get_client(sync_client=True) as client:
        template = DockerWorker.get_default_base_job_template()
        made = WorkPoolCreate(name="containers", type="docker", base_job_template=template)
        client.create_work_pool(made, overwrite=True)
    host = engine.url if known else None
    WorkPool("containers", (Size(1, 1024, gpu),), str(tmp_path), docker_host=host).new_office().shut()
    assert ("Nobody has looked whether containers of work pool 'containers' may have GPUs" in caplog.text) == said


@pytest.mark.parametrize("names", [(), "0"])
def test_devices_are_named_in_a_list(names: Any) -> None:
    with pytest.raises(InvalidValue):
        devices_of(names)
