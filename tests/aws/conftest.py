"""An account whose functions really run, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefect_slo.testing.aws import LocalAws, local_aws


@pytest.fixture(scope="module")
def account() -> Iterator[LocalAws]:
    with local_aws() as account:
        yield account
