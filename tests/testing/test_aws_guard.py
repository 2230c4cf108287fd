"""Nothing under test reaches AWS, and users' tests get the same by asking for a fixture."""

from __future__ import annotations

import boto3
import pytest
from botocore.config import Config

from prefect_slo.testing.aws import RealAwsCall, no_real_aws

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
