from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from prefect_slo import BatchJobs, BatchPool, DaskPool, LambdaPool, RayPool, WorkPool
from prefect_slo.blocks import MenuBlock, PlanBlock, PoolBlock, PriceListBlock, S3PrefixBlock, SLOProfile, fold_in
from prefect_slo.blocks.registering import register
from prefect_slo.cli import main
from prefect_slo.control.delegation import Needs
from prefect_slo.errors import InvalidValue, SloError
from prefect_slo.loop.reporting import objective_of
from prefect_slo.objective import Budget, Latency, Slo
from prefect_slo.plan import Plan, StagePlan
from prefect_slo.pricing import price_list
from prefect_slo.resources import Size
from prefect_slo.runner.workpool.sizing import job_variables
from prefect_slo.telemetry.store import publish

ROOT = Path(__file__).parents[2]


TYPES = ("slo-menu", "slo-price-list", "slo-s3-prefix", "slo-pool", "slo-plan", "slo-profile")
PLACES = {
    "SLO_BUCKET": "our-bucket", "SLO_KUBERNETES_POOL": "cluster", "SLO_MAILBOXES": "/shared/mailboxes",
    "SLO_DASK_SCHEDULER": "tcp://scheduler:8786", "SLO_RAY_ADDRESS": "ray://head:10001",
    "SLO_LAMBDA_ROLE": "arn:aws:iam::1:role/worker", "SLO_BATCH_QUEUE": "jobs", "SLO_BATCH_IMAGE": "image",
}  # fmt: skip
PLAN = Plan("letters", None, {"letter": StagePlan(2, Size(1, 512))})


def stored_documents() -> dict[str, tuple[object, dict[str, object]]]:
    with get_client(sync_client=True) as client:
        documents = [d for slug in TYPES for d in client.read_block_documents_by_type(slug)]
    return {f"{d.block_type_name}/{d.name}": (d.id, d.data) for d in documents}


def test_registering_twice_stores_every_document_once(prefect_server, monkeypatch, capsys):
    for name, value in PLACES.items():
        monkeypatch.setenv(name, value)
    script = str(ROOT / "blocks" / "register.py")
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    first = subprocess.run([sys.executable, script], env=environment, check=True, capture_output=True, text=True)
    for name in ("slo-menu/local", "slo-pool/process", "slo-pool/kubernetes", "slo-s3-prefix/exchange"):
        assert name in first.stdout
    before = stored_documents()
    capsys.readouterr()
    runpy.run_path(script, run_name="__main__")
    assert "slo-profile/ml-pipeline was there and stays as it is" in capsys.readouterr().out
    assert stored_documents() == before
    assert MenuBlock.load("local").menu.workers == (1, 2, 3, 4)
    assert PriceListBlock.load("aws-lambda-x86").prices == price_list("aws-lambda-x86")
    assert S3PrefixBlock.load("exchange").store.bucket == "our-bucket"
    pool = PoolBlock.load("kubernetes").pool
    assert (pool.name, pool.storage.prefix.bucket) == ("cluster", "our-bucket")
    dask, ray, functions, batch = (PoolBlock.load(name).pool for name in ("dask", "ray", "lambda", "batch"))
    assert isinstance(dask, DaskPool)
    assert (dask.address, dask.resources["memory_mb"]) == ("tcp://scheduler:8786", "MEMORY")
    assert isinstance(ray, RayPool)
    assert Size(2, 8192, 0.5, "gpu") in ray.sizes
    assert functions.batch == BatchJobs("jobs", "image", 2.0, 8192, pool="lambda")
    assert functions.bucket.bucket == "our-bucket"
    assert isinstance(batch, BatchPool)
    assert batch.jobs == BatchJobs("jobs", "image", 4.0, 16384, pool="batch")
    assert objective_of(SLOProfile.of_flow("ml-pipeline")) == Slo(Latency(60.0))


def test_documents_whose_variables_are_not_set_are_left_out_and_named(prefect_server, monkeypatch):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    found = runpy.run_path(str(ROOT / "blocks" / "register.py"))["register"]()
    assert found.left_out["s3/exchange.toml"] == ("SLO_BUCKET",)
    assert found.left_out["pools/kubernetes.toml"] == ("SLO_KUBERNETES_POOL",)
    assert "slo-menu/local" in found.stored


def test_a_folder_of_ones_own_is_registered_by_the_command_line(prefect_server, tmp_path, capsys):
    for name, text in {
        "menus/tiny.toml": "workers = [1]\n",
        "plans/nightly.json": PLAN.to_json(),
        "pools/ours.toml": 'kind = "lambda"\nmemory_mb = [512]\nconcurrency = 4\n',
        "profiles/letters.toml": 'flow = "letters to register"\nlatency = "30s"\nbudget_usd = 0.5\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main(["register", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "slo-plan/nightly" in told["stored"]
    assert any(name.startswith("slo-profile/letters-to-register") for name in told["stored"])
    assert told["kept"] == []
    assert PlanBlock.load("nightly").plan == PLAN
    assert PoolBlock.load("ours").pool == LambdaPool(memory_mb=(512,), concurrency=4)
    assert objective_of(SLOProfile.of_flow("letters to register")) == Slo(Latency(30.0), Budget(0.5))
    (tmp_path / "menus" / "bad.toml").write_text("colour = 1\n")
    assert main(["register", str(tmp_path)]) == 1
    assert "menus/bad.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("menues/a.toml", "workers = [1]", r"folder is .*; expected documents in menus, .*; it has \['menues/'\]"),
        ("pools/a.toml", 'kind = "lambda"\nmemory = [512]', "pools/a.toml: a field of pool is 'memory'; expected one"),
        ("pools/a.toml", 'kind = "batch"\nbucket = "s3://b"', "pools/a.toml: pool.jobs is None; expected a value"),
        ("menus/a.toml", "workers = [1", "menus/a.toml is 'workers = .*; expected TOML"),
    ],
)
def test_a_file_that_is_not_stored_is_named_with_what_is_wrong_in_it(
    prefect_server, tmp_path, file: str, text: str, said: str
):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text)
    with pytest.raises(InvalidValue, match=said):
        register(tmp_path)


def test_what_a_flow_has_learned_is_never_touched(prefect_server, tmp_path, make_run, fit_sums):
    publish("learned before", [make_run("learned before", 1)])
    fold_in("learned before", objective={"latency_s": 9.0}, fit=fit_sums)
    known = SLOProfile.of_flow("learned before")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "it.toml").write_text('flow = "learned before"\nlatency = "1s"\n')
    found = register(tmp_path)
    [kept] = found.kept
    assert kept.startswith("slo-profile/learned-before")
    assert kept not in found.stored
    assert SLOProfile.of_flow("learned before") == known


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "submarine", "name": "x"},
        {"name": "x", "storage": "/tmp/x", "colour": "red"},
        {"name": "x", "storage": "/tmp/x", "sizes": [{"cores": 1}]},
        {"name": "", "storage": "/tmp/x"},
        {"name": "x", "storage": "/tmp/x", "sizes": {"vcpus": 1}},
        {"name": "x", "storage": "/tmp/x", "sizing": {"rule": []}},
        {"name": "x", "storage": "/tmp/x", "sizing": {"rules": [{"variable": "cpu"}]}},
        {"kind": "lambda", "bucket": "s3://b", "batch": "a queue"},
        {"kind": "lambda", "bucket": "s3://b", "batch": {"queue": "q"}},
        {"kind": "lambda", "needs": {"cores": 4}},
        {"kind": "batch", "bucket": "s3://b"},
        {"kind": "batch", "bucket": "s3://b", "jobs": {"queue": {"name": 3}, "image": "i"}},
        {"kind": "dask", "resources": {"cores": "CPU"}},
        {"kind": "dask", "adapt": 4},
        {"kind": "ray", "options": ["x"]},
    ],
)
def test_a_pool_that_cannot_be_is_refused(document):
    with pytest.raises((SloError, ValueError)):
        PoolBlock(document=document)


def test_tables_in_the_document_of_a_pool_are_what_they_stand_for():
    queue = {"name": "ours", "kind": "fargate-spot", "subnets": ["s-1"], "security_groups": ["g-1"]}
    jobs = {"queue": queue, "image": "i", "vcpus": 1, "memory_mb": 2048, "execution_role": "arn", "poll_s": [0.5, 2]}
    delegating = {"kind": "lambda", "bucket": "s3://b/p", "batch": jobs, "needs": {"gpu": 1, "memory_mb": 4096}}
    pool = PoolBlock(document=delegating).pool
    assert isinstance(pool, LambdaPool)
    assert (pool.batch.queue.name, pool.batch.poll_s, pool.needs) == ("ours", (0.5, 2), Needs(1, 4096))
    sizing = {"rules": [{"of": "memory_mb", "variable": "ram", "text": "{}Mi"}], "machines": {"small": [1, 2048]}}
    sized = PoolBlock(document={"name": "x", "storage": "/tmp/x", "sizing": sizing}).pool
    assert isinstance(sized, WorkPool)
    assert job_variables(sized.sizing, Size(1, 512)) == {"ram": "512Mi"}


@pytest.mark.parametrize("rebuild", [False, True])
def test_the_refit_flow_brings_profiles_up_to_date(prefect_server, make_run, tmp_path, monkeypatch, rebuild):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_SLO_HOME", str(tmp_path))
    name = f"refit {rebuild}"
    publish(name, [make_run(name, n, workers=n % 3 + 1) for n in range(6)])
    refit = runpy.run_path(str(ROOT / "flows" / "refit.py"))["refit"]
    for revision in (1, 2):
        assert refit(name, rebuild=rebuild) == {name: "no bound is known"}, "nobody has asked for one"
        assert SLOProfile.of_flow(name).revision == revision
