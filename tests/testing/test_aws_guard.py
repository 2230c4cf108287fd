"""Nothing under test reaches AWS, and users' tests get the same by asking for a fixture."""

from __future__ import annotations

import re
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from prefect_slo.errors import SloError
from prefect_slo.testing import server
from prefect_slo.testing.aws import RealAwsCall, kept, local_aws, no_real_aws

pytest_plugins = ["pytester"]
ONCE = Config(retries={"total_max_attempts": 1, "mode": "standard"})


def test_nothing_reaches_aws_whatever_the_environment_says(monkeypatch, tmp_path) -> None:
    """With credentials and a profile that look real, and without moto, a call ends at the wall."""
    credentials = tmp_path / "credentials"
    credentials.write_text(
        "[prod]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = wJalrXUtnFEMI/K7\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_PROFILE", "prod")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    session = boto3.session.Session(profile_name="prod", region_name="eu-west-1")
    with no_real_aws():
        for service, ask in (("s3", "list_buckets"), ("lambda", "list_functions"), ("sts", "get_caller_identity")):
            with pytest.raises(RealAwsCall, match=r"amazonaws\.com"):
                getattr(session.client(service, config=ONCE), ask)()


async def test_asynchronous_clients_reach_nothing_either(monkeypatch) -> None:
    aiobotocore = pytest.importorskip("aiobotocore.session")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "AKIAIOSFODNN7EXAMPLE")
    async with aiobotocore.get_session().create_client("s3", region_name="eu-west-1") as client:
        with no_real_aws(), pytest.raises(RealAwsCall, match=r"amazonaws\.com"):
            await client.list_buckets()


def test_with_real_looking_credentials_all_that_the_fixtures_do_stays_on_this_machine(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """A profile, keys and an endpoint that look real: every socket of a test that uses everything goes to loopback, and
    neither functions nor jobs get to see the keys."""
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    files = {
        "config": "[profile prod]\nregion = eu-west-1\nendpoint_url = https://s3.eu-west-1.amazonaws.com\n",
        "credentials": f"[prod]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {secret}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for name, value in {
        "AWS_PROFILE": "prod",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_SESSION_TOKEN": secret,
        "AWS_ENDPOINT_URL": "https://lambda.eu-west-1.amazonaws.com",
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/admin",
    }.items():
        monkeypatch.setenv(name, value)
    pytester.makepyfile(
        """
        import os, socket, threading, urllib.request
        import cloudpickle
        from prefect_slo import BatchJobs
        from prefect_slo.aws.exchange import Exchange, Order
        from prefect_slo.aws.jobs import BatchInvoker
        from prefect_slo.runner.payloads import by_value

        SECRET = "wJalrXUtnFEMI"

        def seen():
            import boto3
            session = boto3.session.Session()
            keys = session.get_credentials()
            return dict(os.environ), keys.access_key, session.profile_name, reached_with_keys(boto3)

        def reached_with_keys(boto3):
            from botocore.config import Config
            once = Config(connect_timeout=1, retries={"total_max_attempts": 1})
            real = boto3.session.Session("AKIAIOSFODNN7EXAMPLE", SECRET, region_name="eu-west-1")
            try:
                real.client("s3", endpoint_url="https://s3.eu-west-1.amazonaws.invalid", config=once).list_buckets()
            except BaseException as error:
                return type(error).__name__

        def test_everything(monkeypatch, slo_aws, slo_lambda, slo_batch, slo_s3, slo_faults):
            reached, real = [], socket.socket.connect
            def connect(self, address):
                reached.append(address)
                return real(self, address)
            monkeypatch.setattr(socket.socket, "connect", connect)
            urllib.request.urlopen(slo_aws.endpoint + "/moto-api/").read()
            assert len(reached) == 1  # it hears of them
            with by_value():
                code = cloudpickle.dumps(seen)
            call = [(1, cloudpickle.dumps(((), {})))]
            pool = slo_aws.pool(memory_mb=(256,), once=True)
            jobs = BatchJobs(slo_batch.queue(), "image", poll_s=(0.02, 0.1), region="us-east-1")
            jobs.deploy()
            slo_s3.put("large", bytes(9_000_000))
            assert len(slo_s3.get("large", 9_000_000)) == 9_000_000
            for exchange in (pool.exchange(), Exchange(BatchInvoker(jobs, slo_s3), slo_s3)):
                key = ("runs", "k", type(exchange.invoker).__name__)
                returned = exchange.run(pool.functions.name(256), Order("function", code, call, key))
                environment, key, profile, ended = cloudpickle.loads(returned.items[0].payload)
                assert key == "testing" and profile == "default"
                assert ended == "RealAwsCall", "whatever keys code brings itself, it gets no further than the wall"
                assert environment["AWS_CONFIG_FILE"] == environment["AWS_SHARED_CREDENTIALS_FILE"] == os.devnull
                assert not any(SECRET in value or "amazonaws.com" in value for value in environment.values())
                assert "AWS_PROFILE" not in environment and "AWS_ROLE_ARN" not in environment
            pool.destroy()
            hosts = {address[0] for address in reached if isinstance(address, tuple)}
            assert hosts <= {"127.0.0.1", "::1", "localhost"}, hosts
            assert slo_lambda.invocations and slo_batch.states["SUCCEEDED"] == 1
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "-q").assert_outcomes(passed=1)


def test_what_the_page_on_testing_shows_passes(pytester: pytest.Pytester, prefect_server: str) -> None:
    """Its tests as a user would copy them, run by pytest with the fixtures that the package brings."""
    page = Path(__file__).parents[2] / "docs/how-to/test-with-aws.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    pytester.makepyfile("\n".join(blocks))
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)


def test_a_default_session_from_before_is_put_aside_and_there_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = boto3.session.Session("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7", region_name="eu-west-1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", mine)
    with local_aws():
        boto3.client("s3").list_buckets()
        assert boto3.DEFAULT_SESSION is not mine
        assert boto3.DEFAULT_SESSION.get_credentials().access_key == "testing"
    assert boto3.DEFAULT_SESSION is mine


def test_fixtures_are_there_for_users_and_leave_nothing_behind(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import os
        import boto3
        from prefect_slo.testing.aws import Fault

        def test_account(slo_aws, slo_lambda, slo_faults):
            assert os.environ["AWS_ACCESS_KEY_ID"] == "testing"
            assert "AWS_PROFILE" not in os.environ
            pool = slo_aws.pool(memory_mb=(128,), bucket=None)
            name = pool.functions.name(128)
            slo_faults.add(Fault("lambda.Invoke", "throttle", times=1))
            reply = boto3.client("lambda").invoke(FunctionName=name, Payload=b'{"warm": true}')["Payload"].read()
            assert b'"ok": true' in reply
            assert slo_lambda.sandboxes == 1

        def test_unasked_nothing_is_changed():
            assert os.environ["AWS_PROFILE"] == "prod"
        """
    )
    monkeypatch.setenv("AWS_PROFILE", "prod")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_without_the_extra_the_test_bed_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(kept, "find_spec", lambda name: None)
    with (
        pytest.raises(SloError, match=r"needs moto and awslambdaric: pip install 'prefect-slo\[testing\]'"),
        local_aws(),
    ):
        pass
    with pytest.raises(SystemExit):
        server.main([])
    assert "pip install 'prefect-slo[testing]'" in capsys.readouterr().err
