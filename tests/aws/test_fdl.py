"""Function Definition Language files become workflows: edges by paths, menus by execution mode."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_slo.aws.fdl import load_fdl, read_fdl
from prefect_slo.errors import InvalidValue, InvalidWorkflow
from prefect_slo.resources import Size
from prefect_slo.workflow import Workflow

VIDEO = """
functions:
  aws:
  - lambda:
      name: split
      container:
        image: video/tools:1
      init_script: split.sh
      execution_mode: lambda-batch
      memory: 1024
      timeout: 900
      input:
      - storage_provider: s3
        path: films/incoming
      output:
      - storage_provider: s3
        path: films/frames
        suffix: [png]
      - storage_provider: s3
        path: films/sound
        suffix: [wav]
    batch:
      vcpus: 2
      memory: 4096
  - lambda:
      name: transcribe
      memory: 2048
      input:
      - storage_provider: s3
        path: films/sound/
      output:
      - storage_provider: s3
        path: films/done
  - lambda:
      name: detect
      execution_mode: batch
      input:
      - storage_provider: s3
        path: films/frames
      output:
      - storage_provider: s3
        path: films/done
    batch:
      vcpus: 4
      memory: 12288
      enable_gpu: true
"""


@pytest.fixture
def video(tmp_path: Path) -> Path:
    file = tmp_path / "films.yaml"
    file.write_text(VIDEO)
    return file


def test_who_reads_what_another_writes_comes_after_it(video: Path) -> None:
    workflow, functions = load_fdl(video)
    assert workflow.name == "films"
    assert {stage.name: stage.parents for stage in workflow.stages} == {
        "split": (),
        "transcribe": ("split",),
        "detect": ("split",),
    }
    assert functions["split"].image == "video/tools:1"
    assert functions["split"].script == "split.sh"


def test_the_mode_says_which_pools_there_are(video: Path) -> None:
    workflow, functions = load_fdl(video)
    pools = {stage.name: [pool.name for pool in stage.menu.pools] for stage in workflow.stages}
    assert pools == {"split": ["lambda", "batch"], "transcribe": ["lambda"], "detect": ["batch"]}
    assert workflow["detect"].menu.options()[0].size == Size(4, 12288, 1.0, "gpu")
    assert [option.size.memory_mb for option in workflow["split"].menu.options()] == [1024, 4096]
    assert (functions["transcribe"].memory_mb, functions["transcribe"].timeout_s) == (2048, 300)


def test_the_workflow_can_be_written_and_read_as_any_other(video: Path) -> None:
    workflow, _ = load_fdl(video)
    assert Workflow.from_document(workflow.to_document()) == workflow


def test_a_command_writes_the_workflow_file(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from prefect_slo.cli import main

    written = tmp_path / "workflow.json"
    assert main(["aws", "fdl", str(video), "-o", str(written)]) == 0
    assert Workflow.load(written) == load_fdl(video)[0]
    assert main(["aws", "fdl", str(tmp_path / "absent.yaml")]) == 1


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"functions": {"aws": 3}},
        {"functions": {"oscar": []}},
        {"functions": {"aws": [{"lambda": {}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a", "execution_mode": "fargate"}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a", "memory": 64}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a", "timeout": 901}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a", "input": [{"storage_provider": "s3"}]}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a", "execution_mode": "batch"}, "batch": {"enable_gpu": "yes"}}]}},
        {"functions": {"aws": [{"lambda": {"name": "a"}}, {"lambda": {"name": "a"}}]}},
        {
            "functions": {
                "aws": [
                    {"lambda": {"name": "a", "input": [{"path": "x"}], "output": [{"path": "y"}]}},
                    {"lambda": {"name": "b", "input": [{"path": "y"}], "output": [{"path": "x"}]}},
                ]
            }
        },
    ],
)
def test_what_is_no_workflow_is_refused(document: object) -> None:
    with pytest.raises(InvalidValue):
        read_fdl(document)


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("functions: [")
    with pytest.raises(InvalidWorkflow, match="readable"):
        load_fdl(file)
