"""What a machine's GPUs are, and what a worker is told of its share: with programs in place of NVIDIA's."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device, Share
from prefect_slo.runner.local import gpus
from prefect_slo.runner.local.book import MemoryBook
from prefect_slo.runner.local.gpu_ledger import GpuLedger

TWO = "0, GPU-aaaa, 81559, Disabled\n1, GPU-bbbb, 40960, [N/A]\n"
PARTITIONED = "0, GPU-aaaa, 81559, Enabled\n1, GPU-bbbb, 81559, Disabled\n"
LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111)
  MIG 2g.20gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts shell scripts on the path, and nothing else there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    gpus.forget()

    def put(name: str, script: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        gpus.forget()
        return path

    yield put
    gpus.forget()


def test_a_machine_without_the_program_has_no_gpu(programs):
    assert gpus.devices() == ()


@pytest.mark.parametrize("script", ["exit 9", "echo no devices were found", "echo 0, GPU-x, [N/A], Disabled"])
def test_a_program_that_fails_or_says_something_else_shows_none(programs, script):
    programs("nvidia-smi", script)
    assert gpus.devices() == ()


def test_devices_go_by_their_uuid(programs):
    programs("nvidia-smi", f'printf "{TWO}"')
    assert gpus.devices() == (Device("GPU-aaaa", 81559), Device("GPU-bbbb", 40960))


def test_the_machine_is_asked_once(programs, tmp_path):
    programs("nvidia-smi", f'echo asked >> {tmp_path}/asked; printf "{TWO}"')
    assert gpus.devices() == gpus.devices()
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb"]),
        ("", []),
        ("1", ["GPU-bbbb"]),
        ("1, 0", ["GPU-bbbb", "GPU-aaaa"]),
        ("GPU-b", ["GPU-bbbb"]),
        ("1,7,0", ["GPU-bbbb"]),
        ("-1", []),
        ("GPU-", []),
        ("0,0", ["GPU-aaaa"]),
    ],
)
def test_what_is_hidden_from_this_process_is_no_device_of_its_workers(value, names):
    assert [device.name for device in gpus.visible(gpus.parse(TWO), value)] == names


def test_a_partitioned_device_is_used_by_its_partitions():
    found = gpus.parse(PARTITIONED, LISTING)
    assert [(index, device.name) for index, device in found] == [("", "MIG-1111"), ("", "MIG-2222"), ("1", "GPU-bbbb")]
    assert found[0][1].memory_mb == pytest.approx(9536)
    assert gpus.visible(found, "MIG-2222") == (Device("MIG-2222", 19073),)


def test_the_listing_is_asked_for_where_a_device_is_partitioned(programs):
    programs("nvidia-smi", f'case "$1" in -L) printf "{LISTING}";; *) printf "{PARTITIONED}";; esac')
    assert [device.name for device in gpus.devices()] == ["MIG-1111", "MIG-2222", "GPU-bbbb"]


def test_devices_can_be_named_by_hand(programs):
    assert gpus.devices(["0:16384", "GPU-x:8192"]) == (Device("0", 16384), Device("GPU-x", 8192))


@pytest.mark.parametrize("name", ["1", "GPU-bbbb", "GPU-b"])
def test_a_device_that_is_named_and_one_that_is_found_are_one(programs, name):
    programs("nvidia-smi", f'printf "{TWO}"')
    assert gpus.devices([f"{name}:8192"]) == (Device("GPU-bbbb", 8192),)


def test_what_is_named_by_hand_and_what_is_found_have_one_account(programs):
    programs("nvidia-smi", f'printf "{TWO}"')
    book = MemoryBook()
    found, named = GpuLedger(gpus.devices(), book), GpuLedger(gpus.devices(["0:81559"]), book)
    found.claim(Share(2))
    assert not named.claim(Share(0.25)).granted


@pytest.mark.parametrize("entry", ["7:8192", "GPU-:8192", "0:90000"])
def test_a_name_that_means_no_device_here_or_more_than_one_is_refused(programs, entry):
    programs("nvidia-smi", f'printf "{TWO}"')
    with pytest.raises(InvalidValue):
        gpus.devices([entry])


def test_a_device_is_named_once(programs):
    programs("nvidia-smi", f'printf "{TWO}"')
    with pytest.raises(InvalidValue, match="every device once"):
        gpus.devices(["0:8192", "GPU-aaaa:8192"])


def test_a_part_of_the_memory_that_was_named_is_a_smaller_part_of_the_device(programs):
    programs("nvidia-smi", f'printf "{TWO}"')
    gpus.devices()
    told = gpus.environment(Share(0.5), gpus.devices(["1:20480"]), "turns")
    assert float(told[gpus.FRACTION]) == 0.25


@pytest.mark.parametrize("entry", ["0", "0:much", ":16384", "0:-1"])
def test_a_device_without_its_memory_is_refused(entry):
    with pytest.raises(InvalidValue):
        gpus.devices([entry])


def test_mps_is_there_where_its_daemon_answers(programs):
    assert gpus.sharing() == "turns"
    programs(
        "nvidia-cuda-mps-control", 'read command; [ "$command" = get_default_active_thread_percentage ] && echo 100.0'
    )
    assert gpus.sharing() == "mps"
    programs("nvidia-cuda-mps-control", "echo Cannot find MPS control daemon process; exit 1")
    assert gpus.sharing() == "turns"


def test_a_daemon_that_hangs_is_ended_and_sharers_take_turns(programs, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(gpus, "_MPS_S", 0.2)
    programs("nvidia-cuda-mps-control", f"echo asked >> {tmp_path}/asked; exec /bin/sleep 600")
    assert [gpus.sharing() for _ in range(3)] == ["turns"] * 3
    assert (tmp_path / "asked").read_text() == "asked\n", "one that hangs is not asked for every worker"
    assert "nvidia-cuda-mps-control has not answered" in caplog.text


def test_a_program_that_lists_no_devices_in_time_holds_nobody_up_again(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "_SMI_S", 0.2)
    programs("nvidia-smi", f"echo asked >> {tmp_path}/asked; exec /bin/sleep 600")
    assert [gpus.devices() for _ in range(3)] == [()] * 3
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.parametrize("trouble", ["exec /bin/sleep 600", "exit 9"])
def test_a_device_that_is_named_waits_for_who_knows_which_it_is(programs, monkeypatch, trouble):
    monkeypatch.setattr(gpus, "_SMI_S", 0.2)
    programs("nvidia-smi", trouble)
    assert gpus.devices() == ()
    assert gpus.devices_now(["0:8192"]) is None, "by its index it would have an account of its own"
    assert gpus.devices_now(["GPU-b:8192"]) is None
    uuid = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
    assert gpus.devices_now([f"{uuid}:8192"]) == (Device(uuid, 8192),)
    assert gpus.devices_now() == ()


def test_a_worker_sees_its_device_and_the_memory_that_it_may_take():
    told = gpus.environment(Share(0.25), (Device("GPU-aaaa", 16384),), "turns")
    assert told["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa"
    assert float(told[gpus.FRACTION]) == 0.25
    assert int(told["CUPY_GPU_MEMORY_LIMIT"]) == 4096 * 2**20
    assert not any(name.startswith("CUDA_MPS") for name in told)


def test_where_mps_runs_the_driver_holds_a_worker_to_its_share():
    told = gpus.environment(Share(0.3, 2000), (Device("GPU-aaaa", 16384),), "mps")
    assert told["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "30"
    assert told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=2000M"


def test_whole_devices_are_held_to_nothing_and_their_worker_knows_that_it_has_them():
    told = gpus.environment(Share(2), (Device("GPU-a", 16384), Device("GPU-b", 16384)), "mps")
    assert told == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b", gpus.SHARE: "2"}
