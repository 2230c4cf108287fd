"""Requests that are not waited for long."""

from __future__ import annotations

from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from prefect_slo.telemetry.impatience import impatient


def test_inside_requests_are_tried_once_more_and_nothing_else_changes():
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        before = get_current_settings()
        with impatient():
            inside = get_current_settings()
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 1
            others = set(type(before).model_fields) - {"client"}
            assert all(getattr(inside, name) == getattr(before, name) for name in others)
            assert inside.server is before.server, "to validate all settings takes 25 ms"
        assert get_current_settings() is before
    assert before.client.max_retries == 5
