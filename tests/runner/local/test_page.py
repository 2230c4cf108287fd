"""What a worker publishes can be read at any moment by another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prefect_slo.runner.local.page import Page, Reading


@pytest.fixture
def pages():
    fd = Page.allocate()
    writer, reader = Page(fd), Page(fd)
    yield writer, reader, fd
    writer.close()
    reader.close()
    os.close(fd)


def test_a_reader_sees_which_item_runs_and_since_when(pages):
    writer, reader, _ = pages
    assert reader.read(1) == Reading(0, 0, 0.0)
    writer.bundle(1)
    writer.start(0, 10.5)
    assert reader.read(1) == Reading(1, 0, 10.5)
    assert reader.read(1).running
    writer.end(0)
    assert not reader.read(1).running
    writer.start(1, 11.5)
    assert reader.read(1) == Reading(2, 1, 11.5)


def test_an_earlier_bundle_says_nothing_of_the_one_that_was_sent_since(pages):
    writer, reader, _ = pages
    writer.bundle(1)
    writer.start(5, 1.0)
    assert reader.read(2) == Reading(0, 0, 0.0)
    writer.bundle(2)
    assert reader.read(2)[:2] == (0, 0)


def test_the_page_outlives_a_writer_that_is_killed(pages):
    _, reader, fd = pages
    code = f"""
import os
from prefect_slo.runner.local.page import Page
page = Page({fd})
page.bundle(3)
page.start(7, 42.0)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], pass_fds=(fd,), check=False).returncode == -9
    assert reader.read(3) == Reading(8, 0, 42.0)
