"""The installed command: exit codes, streams, and how soon it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefect_slo
from prefect_slo.cli import main


def _command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from prefect_slo.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def test_plan_infeasible_and_error_have_their_exit_codes(source: list[object]) -> None:
    done = _command("plan", *source, "--latency", "6s", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["schema"] == 1
    assert _command("plan", *source, "--latency", "1s").returncode == 2
    failed = _command("plan", *source, "--latency", "1 parsec")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "Traceback" not in failed.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = "import sys; from prefect_slo.cli import main; sys.exit(main(['prices', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # as head does
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


@pytest.mark.parametrize("characters", [10, 1_000_000])
def test_output_that_nobody_reads_is_no_error_however_much_it_is(
    characters: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    unread, written = os.pipe()
    os.close(unread)
    monkeypatch.setattr(sys.modules["prefect_slo.cli.main"], "app", lambda *_, **__: print("x" * characters))
    with os.fdopen(written, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["prices"]) == 141
        print("goes nowhere, and is no error")
    assert capfd.readouterr().err == ""


def test_another_pipe_that_breaks_is_an_error_and_the_output_is_still_read(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        print("so far")
        raise BrokenPipeError(32, "Broken pipe: a worker's")

    monkeypatch.setattr(sys.modules["prefect_slo.cli.main"], "app", broken)
    read, written = os.pipe()
    with os.fdopen(read) as reader:
        with os.fdopen(written, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert main(["prices"]) == 1
            print("and then")
        assert reader.read() == "so far\nand then\n"
    assert capfd.readouterr().err == "prefect-slo: [Errno 32] Broken pipe: a worker's\n"


def test_help_and_version_load_nothing_heavy() -> None:
    loaded = (
        "import sys; from prefect_slo.cli import main; main(['--help']); main(['--version']); "
        "heavy = {'prefect', 'numpy', 'pandas', 'scipy', 'cvxpy', 'networkx', 'boto3'} & set(sys.modules); "
        "sys.exit(','.join(heavy) or 0)"
    )
    answer = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    assert prefect_slo.__version__ in answer.stdout
    for command in ("plan", "predict", "fit", "evaluate", "diff", "prices"):
        assert command in answer.stdout


def test_a_defect_is_one_line_unless_a_traceback_is_asked_for(
    run, source: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_slo.models import WorkflowModel

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(WorkflowModel, "fit", broken)
    answer = run("plan", *source, "--latency", "6s")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "ZeroDivisionError: by zero (a defect" in answer.err
    monkeypatch.setenv("PREFECT_SLO_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run("plan", *source, "--latency", "6s")


def test_prices_lists_what_menus_may_name(run, tmp_path: Path) -> None:
    listed = {entry["name"]: entry for entry in run("prices", "--json").document["prices"]}
    assert {"local", "aws-lambda-x86", "aws-lambda-arm"} <= set(listed)
    assert listed["aws-lambda-x86"]["as_of"]
    (tmp_path / "own.toml").write_text('name = "own"\nvcpu_second = 0.001\n')
    assert "$3.6" in run("prices", tmp_path / "own.toml").out
