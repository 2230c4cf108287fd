"""A sandbox's temporary disk is as large as its function's: what fills it meets the error that it meets on Lambda."""

from __future__ import annotations

import errno
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from prefect_slo.errors import InvalidValue
from prefect_slo.testing.aws import LocalAws, disk, lambdas, local_aws
from prefect_slo.testing.aws.disk import Disk

CODE = """
import errno, os, tempfile
def handler(event, context):
    path = os.path.join(tempfile.gettempdir(), event["name"])
    kept = sorted(os.listdir(tempfile.gettempdir()))
    try:
        with open(path, "wb") as file:
            for _ in range(event["mb"]):
                file.write(bytes(1 << 20))
    except OSError as error:
        os.unlink(path)
        if event.get("raise"):
            raise
        return {"errno": errno.errorcode[error.errno], "kept": kept}
    return {"kept": kept, "at": path}
"""


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account


@pytest.fixture
def call(account: LocalAws) -> Iterator[Callable[..., Any]]:
    """Runs the handler in a sandbox of 3 MB of disk, which no function of Lambda could have."""
    client, package = boto3.client("lambda"), io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("main.py", CODE)
    client.create_function(
        FunctionName="fills", Runtime="python3.11", Role=account.role, Handler="main.handler", MemorySize=256,
        Timeout=20, Code={"ZipFile": package.getvalue()}, EphemeralStorage={"Size": 700},
    )  # fmt: skip
    from moto.awslambda.models import lambda_backends

    [number] = [each for each in lambda_backends if "us-east-1" in lambda_backends[each]]
    spec = account.lambdas._kept.spec(lambda_backends[number]["us-east-1"].get_function("fills"))
    assert spec.storage_mb == 700
    small = replace(spec, storage_mb=3)

    def run(name: str, mb: int, **more: Any) -> tuple[Any, str]:
        done, reply = account.lambdas.run(small, json.dumps({"name": name, "mb": mb, **more}).encode())
        return json.loads(reply), done.error

    yield run
    account.lambdas.reap()
    client.delete_function(FunctionName="fills")


def needs_its_own() -> None:
    if disk.own_file_systems() is None:
        pytest.skip("no process here may have file systems of its own")


def test_a_full_disk_is_the_kernels_own_error_and_the_sandbox_goes_on(call: Callable[..., Any]) -> None:
    needs_its_own()
    assert call("large", 4) == ({"errno": "ENOSPC", "kept": []}, "")
    reply, error = call("small", 2)
    assert (reply["kept"], error) == ([], ""), "what was deleted makes room again"
    assert not Path(reply["at"]).exists(), "and nobody else sees it"
    reply, error = call("large", 2)
    assert (reply, error) == ({"errno": "ENOSPC", "kept": ["small"]}, ""), "files stay as long as the sandbox is warm"


def test_a_sandbox_begins_with_an_empty_disk(call: Callable[..., Any], account: LocalAws) -> None:
    call("small", 1)
    assert call("other", 1)[0]["kept"] == ["small"]
    account.lambdas.reap()
    assert call("other", 1)[0]["kept"] == []


def test_an_error_of_the_disk_comes_out_as_one(call: Callable[..., Any]) -> None:
    needs_its_own()
    reply, error = call("large", 4, **{"raise": True})
    assert (reply["errorType"], reply["errorMessage"]) == ("OSError", "[Errno 28] No space left on device")
    assert error == "OSError"


def test_where_there_are_no_file_systems_of_its_own_it_is_told_at_the_end(
    call: Callable[..., Any], account: LocalAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "own_file_systems", lambda: None)
    assert call("small", 2)[1] == ""
    reply, error = call("large", 4)
    assert (error, reply["errorType"], reply["errorMessage"]) == (
        "OSError", "OSError", "[Errno 28] No space left on device",
    )  # fmt: skip
    account.lambdas.reap()


@pytest.mark.parametrize("own", disk.OWN, ids=lambda own: own[1])
def test_a_tmp_of_its_own_is_for_code_that_names_paths_there(
    account: LocalAws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: tuple[str, ...]
) -> None:
    """As root, and as anybody in a user namespace."""
    if not disk.works(own):
        pytest.skip(f"{' '.join(own)} is not allowed here")
    monkeypatch.setattr(disk, "own_file_systems", lambda: own)
    monkeypatch.setattr(account.lambdas, "_own_tmp", True)
    code = """
import os, tempfile
def handler(event, context):
    try:
        with open("/tmp/large", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, event["mb"] << 20)
        fits = True
    except OSError as error:
        fits = error.errno
    seen = os.path.exists(event["path"])
    return {"fits": fits, "folder": tempfile.gettempdir(), "seen": seen}
"""
    client, package = boto3.client("lambda"), io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("main.py", code)
    client.create_function(
        FunctionName="names", Runtime="python3.11", Role=account.role, Handler="main.handler", MemorySize=256,
        Timeout=20, Code={"ZipFile": package.getvalue()}, EphemeralStorage={"Size": 512},
    )  # fmt: skip
    for mb, fits in ((600, errno.ENOSPC), (20, True)):
        event = json.dumps({"mb": mb, "path": str(tmp_path)}).encode()
        reply = json.loads(client.invoke(FunctionName="names", Payload=event)["Payload"].read())
        assert reply == {"fits": fits, "folder": "/tmp", "seen": False}
    assert not Path("/tmp/large").exists()
    account.lambdas.reap()
    client.delete_function(FunctionName="names")


def test_a_tmp_of_its_own_is_refused_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambdas, "own_file_systems", lambda: None)
    with pytest.raises(InvalidValue, match="user namespaces"):
        lambdas.LocalLambda(own_tmp=True)


def test_holes_in_files_take_no_space(tmp_path: Path) -> None:
    kept = Disk(tmp_path, 1)
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(5 << 20)
    assert not kept.overfull
    (tmp_path / "full").write_bytes(b"x" * (2 << 20))
    assert kept.overfull
    assert not replace(kept, own=("unshare",)).overfull
