"""Sizes become the job variables of each type of pool; variables that a pool does not have are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import WorkPool as PrefectPool
from prefect.utilities.templating import apply_values

from prefect_slo.errors import InvalidValue, WorkPoolUnusable
from prefect_slo.resources import Size
from prefect_slo.runner.workpool.sizing import Rule, Sizing, checked, extended, job_variables

TEMPLATES = {
    "process": ("env", "command", "working_dir"),
    "docker": ("image", "mem_limit", "memswap_limit"),
    "kubernetes": ("image", "cpu_request", "cpu_limit", "memory_request", "memory_limit"),
    "ecs": ("cpu", "memory", "launch_type"),
    "cloud-run": ("cpu", "memory"),
    "cloud-run-v2": ("cpu", "memory"),
    "azure-container-instance": ("cpu", "memory", "gpu_count", "gpu_sku"),
    "vertex-ai": ("machine_type", "accelerator_type", "accelerator_count"),
}
"""Variables about size of the templates that Prefect's own integrations ship."""

JOBS: dict[str, dict[str, Any]] = {
    "kubernetes": {"job_manifest": {"spec": {"template": {"spec": {"containers": [{"name": "prefect-job"}]}}}}},
    "docker": {"image": "{{ image }}"},
    "ecs": {"task_definition": {"containerDefinitions": [{"image": "{{ image }}"}]}},
}


def pool(kind: str, *more: str) -> PrefectPool:
    properties = {name: {"type": "string"} for name in (*TEMPLATES[kind], *more)}
    template = {"variables": {"properties": properties}, "job_configuration": JOBS.get(kind, {})}
    return PrefectPool(name="pool", type=kind, base_job_template=template)


def of(kind: str, size: Size, *more: str, overhead_mb: int = 0, **given: Any) -> dict[str, Any]:
    found = pool(kind, *more, *given)
    return job_variables(checked(found, None, (size,), given), size, overhead_mb=overhead_mb, given=given)


@pytest.mark.parametrize(
    ("kind", "variables"),
    [
        ("process", {}),
        ("docker", {"mem_limit": "2048m"}),
        (
            "kubernetes",
            {"cpu_request": "1500m", "cpu_limit": "1500m", "memory_request": "2048Mi", "memory_limit": "2048Mi"},
        ),
        ("ecs", {"cpu": 2048, "memory": 2048}),
        ("cloud-run", {"cpu": "2000m", "memory": "2048Mi"}),
        ("cloud-run-v2", {"cpu": "2000m", "memory": "2048Mi"}),
        ("azure-container-instance", {"cpu": 1.5, "memory": 2.0}),
        ("vertex-ai", {"machine_type": "e2-standard-4"}),
    ],
)
def test_each_type_of_pool_is_told_in_its_own_units(kind, variables):
    assert of(kind, Size(1.5, 2048)) == variables


@pytest.mark.parametrize(
    ("kind", "more", "variables"),
    [
        ("kubernetes", ("gpu_limit",), {"gpu_limit": 1}),
        ("azure-container-instance", (), {"gpu_count": 1}),
        ("vertex-ai", (), {"accelerator_count": 1, "machine_type": "n1-standard-4"}),
        (
            "docker",
            ("container_create_kwargs",),
            {
                "container_create_kwargs": {
                    "nano_cpus": 2_000_000_000,
                    "device_requests": [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}],
                }
            },
        ),
    ],
)
def test_gpus_are_asked_for(kind, more, variables):
    told = of(kind, Size(2, 4096, gpu=1), *more)
    assert {name: told[name] for name in variables} == variables


@pytest.mark.parametrize(("kind", "variable"), [("kubernetes", "gpu_limit"), ("docker", "container_create_kwargs")])
def test_a_variable_that_the_pool_does_not_have_is_refused_with_the_fix(kind, variable):
    with pytest.raises(WorkPoolUnusable, match=rf"'pool' has no job variable '{variable}'.*prefect-slo pools extend"):
        of(kind, Size(1, 1024, gpu=1))


def test_variables_of_the_users_own_are_checked_too():
    with pytest.raises(WorkPoolUnusable, match="'imagge'"):
        checked(pool("kubernetes"), None, (Size(1, 1024),), {"imagge": "x"})


def test_types_that_nobody_knows_take_a_sizing_of_their_own():
    found = PrefectPool(name="pool", type="slurm", base_job_template={"variables": {"properties": {"ntasks": {}}}})
    with pytest.raises(WorkPoolUnusable, match=r"'slurm'.*sizing="):
        checked(found, None, (Size(1, 1024),), {})
    own = Sizing((Rule("vcpus", "ntasks"),))
    assert job_variables(checked(found, own, (Size(1.5, 1024),), {}), Size(1.5, 1024)) == {"ntasks": 2}


def test_what_the_user_says_wins():
    assert of("kubernetes", Size(1, 1024), cpu_limit="4")["cpu_limit"] == "4"
    told = of("docker", Size(2, 1024), container_create_kwargs={"shm_size": "1g"})
    assert told["container_create_kwargs"] == {"nano_cpus": 2_000_000_000, "shm_size": "1g"}


def test_a_job_gets_what_its_pilot_needs_beyond_the_worker():
    assert of("docker", Size(1, 1024), overhead_mb=256)["mem_limit"] == "1280m"


def test_what_no_job_can_have_is_refused():
    with pytest.raises(InvalidValue, match="at most 16"):
        of("ecs", Size(17, 1024))
    with pytest.raises(InvalidValue, match="fits a machine"):
        of("vertex-ai", Size(64, 1024))


@given(vcpus=st.floats(0.01, 8.0), memory_mb=st.integers(1, 100_000))
def test_no_job_is_smaller_than_its_size(vcpus, memory_mb):
    size = Size(vcpus, memory_mb)
    kubernetes, aci, ecs = (of(kind, size) for kind in ("kubernetes", "azure-container-instance", "ecs"))
    assert int(kubernetes["cpu_limit"].removesuffix("m")) >= 1000 * vcpus - 1e-5
    assert int(kubernetes["memory_limit"].removesuffix("Mi")) >= memory_mb
    assert aci["memory"] * 1024 >= memory_mb - 1e-2
    assert (ecs["cpu"], ecs["memory"]) >= (1024 * vcpus - 1e-5, memory_mb)


def test_a_template_is_extended_and_then_takes_gpus():
    for kind in ("kubernetes", "docker", "ecs"):
        found = pool(kind)
        longer = found.model_copy(update={"base_job_template": extended(found)})
        size = Size(1, 1024, gpu=1)
        assert job_variables(checked(longer, None, (size,), {}), size)
        assert "gpu" not in str(found.base_job_template), "the pool itself is left as it is"
    container = extended(pool("kubernetes"), gpu_resource="nvidia.com/mig-1g.5gb")["job_configuration"]["job_manifest"]
    limits = container["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/mig-1g.5gb": "{{ mig_1g_5gb_limit }}"}
    with pytest.raises(WorkPoolUnusable, match="not extended"):
        extended(pool("process"))


# ---- shares of a GPU ------------------------------------------------------------------------------------------------

TURNS = {"nvidia.com/gpu.shared": {"turns": 4}}


def sharing(*resources: str) -> PrefectPool:
    """A Kubernetes pool whose template was extended for each of these."""
    found = pool("kubernetes")
    for resource in resources:
        template = extended(found, gpu_resource=resource, **TURNS.get(resource, {}))
        found = found.model_copy(update={"base_job_template": template})
    return found


def shares(size: Size, *resources: str) -> dict[str, Any]:
    found = sharing(*resources)
    told = job_variables(checked(found, None, (size,), {}), size)
    return {name: value for name, value in told.items() if "cpu" not in name and not name.startswith("memory")}


def test_a_vgpu_plugin_takes_hundredths_of_cores_and_memory_in_its_units():
    told = shares(Size(1, 1024, 0.25, gpu_memory_mb=4000), "tencent.com/vcuda-core")
    assert told == {"vcuda_core_limit": 25, "vcuda_memory_limit": 16}
    assert shares(Size(1, 1024, 2), "tencent.com/vcuda-core") == {"vcuda_core_limit": 200}
    limits = sharing("tencent.com/vcuda-core").base_job_template["job_configuration"]["job_manifest"]
    assert limits["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "tencent.com/vcuda-core": "{{ vcuda_core_limit }}",
        "tencent.com/vcuda-memory": "{{ vcuda_memory_limit }}",
    }


@pytest.mark.parametrize(
    ("gpu", "memory_mb", "partition"),
    [
        (0.1, 0, "mig_1g_5gb_limit"),
        (0.1, 6_000, "mig_1g_10gb_limit"),
        (0.2, 0, "mig_3g_20gb_limit"),
        (0.4, 20_000, None),
        (0.5, 0, None),
    ],
)
def test_a_size_gets_the_smallest_partition_that_holds_it(gpu, memory_mb, partition):
    resources = [f"nvidia.com/mig-{profile}" for profile in ("3g.20gb", "1g.10gb", "1g.5gb")]
    size = Size(1, 1024, gpu, gpu_memory_mb=memory_mb)
    if partition is not None:
        assert shares(size, *resources) == {partition: 1}
        return
    with pytest.raises(WorkPoolUnusable, match=r"mig-3g\.20gb \(at most 0\.43 of a GPU and 19,073 MB\)"):
        shares(size, *resources)


def test_one_turn_is_all_that_time_slicing_gives():
    assert shares(Size(1, 1024, 0.25), "nvidia.com/gpu.shared") == {"gpu_shared_limit": 1}
    for size in (Size(1, 1024, 0.5), Size(1, 1024, 0.25, gpu_memory_mb=1000)):
        with pytest.raises(WorkPoolUnusable, match="at most 1/4 of a GPU, and no say in memory"):
            shares(size, "nvidia.com/gpu.shared")
    with pytest.raises(InvalidValue, match="turns"):
        extended(pool("kubernetes"), gpu_resource="nvidia.com/gpu.shared")


def test_whole_devices_and_shares_live_side_by_side():
    both = ("nvidia.com/gpu", "nvidia.com/mig-1g.10gb")
    assert shares(Size(1, 1024, 2), *both) == {"gpu_limit": 2}
    assert shares(Size(1, 1024, 0.1), *both) == {"mig_1g_10gb_limit": 1}


@pytest.mark.parametrize(
    ("kind", "more", "then"),
    [
        ("kubernetes", ("gpu_limit",), "pools extend pool --gpu-resource nvidia.com/mig"),
        ("docker", ("container_create_kwargs",), "whole GPUs"),
        ("ecs", ("resource_requirements",), "on Ray"),
        ("azure-container-instance", (), "worker processes of a machine with GPUs"),
        ("vertex-ai", (), "whole GPUs"),
    ],
)
def test_a_share_that_a_pool_cannot_give_is_refused_and_not_rounded_up(kind, more, then):
    with pytest.raises(WorkPoolUnusable, match=then):
        of(kind, Size(1, 1024, gpu=0.5), *more)


@pytest.mark.parametrize(
    ("size", "requirements"),
    [
        (Size(1, 1024), {}),
        (Size(1, 1024, gpu=2), {"resourceRequirements": [{"type": "GPU", "value": "2"}]}),
    ],
)
def test_on_ecs_a_container_has_its_gpus_as_text_and_one_without_asks_for_nothing(size, requirements):
    before = pool("ecs")
    after = PrefectPool(name="pool", type="ecs", base_job_template=extended(before))
    sizing = checked(after, None, (Size(1, 1024), Size(1, 1024, gpu=2)), {})
    told = {"image": "flow", **job_variables(sizing, size)}
    job = apply_values(after.base_job_template["job_configuration"], told)
    assert job["task_definition"]["containerDefinitions"] == [{"image": "flow", **requirements}]


def test_a_vgpu_needs_its_memory_to_be_said():
    with pytest.raises(WorkPoolUnusable, match="shares with gpu_memory_mb, in steps of 256 MB"):
        shares(Size(1, 1024, 0.25), "tencent.com/vcuda-core")


@given(hundredths=st.integers(1, 99), memory_mb=st.integers(1, 80_000))
def test_no_vgpu_is_smaller_than_its_share(hundredths, memory_mb):
    told = shares(Size(1, 1024, hundredths / 100, gpu_memory_mb=memory_mb), "tencent.com/vcuda-core")
    assert told["vcuda_core_limit"] == hundredths
    assert 0 <= 256 * told["vcuda_memory_limit"] - memory_mb < 256
