"""Every mistake ends with exit code 1 and one line that names the field and the value."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

BOUNDS = [
    (["--latency", "nan"], "latency is 'nan'"),
    (["--latency", "-3"], "latency is '-3'"),
    (["--latency", "0"], "latency is '0'"),
    (["--latency", "soon"], "latency is 'soon'"),
    (["--latency", ""], "latency is ''"),
    (["--budget", "inf"], "budget_usd is 'inf'"),
    (["--budget", "€3"], "budget_usd is '€3'"),
    (["--latency", "6s", "--percentile", "95"], "percentile is 95.0"),
    (["--latency", "6s", "--percentile", "1"], "percentile is 1.0"),
    (["--latency", "6s", "--percentile", "nan"], "percentile is nan"),
    (["--latency", "6s", "--percentile", "high"], "--percentile"),
    (["--latency", "6s", "--confidence", "0"], "confidence is 0.0"),
    (["--latency", "6s", "--seed", "one"], "--seed"),
    (["--latency", "6s", "--seed", "-1"], "seed is -1; expected a whole number of at least 0"),
    (["--latency", "6s", "--budget", "0"], "budget_usd is '0'"),
    ([], "latency is None"),
    (["--latency", "6s", "--pin", "count.workers=7"], "'workers': 7"),
    (["--latency", "6s", "--pin", "count.workers=many"], "'many'"),
    (["--latency", "6s", "--pin", "cuont.workers=4"], "stage is 'cuont'"),
    (["--latency", "6s", "--pin", "count.height=4"], "height"),
    (["--latency", "6s", "--pin", "workers"], "pin is 'workers'"),
    (["--latency", "6s", "--output", "/no/such/folder/plan.json"], "output is '/no/such/folder/plan.json'"),
    (["--latency", "6s", "--deadline", "3"], "--deadline"),
]


def _refused(result, *words: str) -> None:
    assert result.code == 1
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    assert result.err.startswith("prefect-slo: ")
    assert "defect" not in result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(("arguments", "words"), BOUNDS, ids=lambda value: " ".join(value) if value else "none")
def test_a_bound_that_is_none_is_refused(run, source, arguments: list[str], words: str) -> None:
    _refused(run("plan", *source, *arguments), words)


@pytest.mark.parametrize("as_json", [True, False])
def test_json_or_not_errors_go_to_standard_error(run, source, as_json: bool) -> None:
    _refused(run("plan", *source, "--latency", "x", *(["--json"] if as_json else [])), "latency is 'x'")


WORKFLOWS = [
    ("name = ", "workflow.toml"),
    ("stages = 3", "stages is 3"),
    ("name = 'empty'", "stages"),
    ("[[stages]]\nname = 'a'\nafter = ['b']", "a.after is 'b'"),
    ("[[stages]]\nname = 'a'\nafter = ['a']", "a -> a"),
    ("[[stages]]\nname = 'a'\n[[stages]]\nname = 'a'", "'a'"),
    ("[[stages]]\nname = 'a'\nmenu.workers = []", "menu.workers is ()"),
    ("[[stages]]\nname = 'a'\nmenu.workers = [0]", "menu.workers is 0"),
    ("[[stages]]\nname = 'a'\nmenu.prices = 'gold'", "menu.prices is 'gold'"),
    ("[[stages]]\nname = 'a'\nprobability = nan", "a.probability is nan"),
    ("[[stages]]\nname = 'a'\ncolour = 'red'", "colour is 'red'"),
    ("constraints = ['a < b']\n[[stages]]\nname = 'a'", "'a < b'"),
]


@pytest.mark.parametrize(("text", "words"), WORKFLOWS)
def test_a_workflow_file_that_is_none_is_refused(run, source, folder: Path, text: str, words: str) -> None:
    (folder / "workflow.toml").write_text(text)
    _refused(run("plan", *source, "--latency", "6s"), words)


TABLES = {
    "missing column": (lambda t: t.drop(columns="workers"), "'workers'"),
    "no size": (lambda t: t.drop(columns=["memory_mb", "vcpus"]), "memory_mb"),
    "NaN": (lambda t: t.assign(wall_s=t.wall_s.mask(t.index == 5)), "wall_s (row 5) is nan"),
    "negative": (lambda t: t.assign(wall_s=t.wall_s.mask(t.index == 5, -1.0)), "wall_s (row 5) is -1.0"),
    "infinite": (lambda t: t.assign(wall_s=t.wall_s.mask(t.index == 5, float("inf"))), "wall_s (row 5) is inf"),
    "a word": (lambda t: t.assign(wall_s=t.wall_s.astype(object).mask(t.index == 5, "long")), "is 'long'"),
    "half a worker": (lambda t: t.assign(workers=t.workers.mask(t.index == 5, 0.5)), "is 0.5"),
    "an unknown stage": (lambda t: t.assign(stage=t.stage.mask(t.index == 5, "merge")), "stage is 'merge'"),
    "no rows": (lambda t: t.iloc[:0], "at least one row"),
    "one setting": (lambda t: t[t.workers.eq(1) & t.vcpus.eq(1) & t.run_id.str.startswith("w1")], "menu offers"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_measures_nothing_is_refused(run, source, folder: Path, name: str) -> None:
    spoil, words = TABLES[name]
    spoil(pd.read_csv(folder / "runs.csv")).to_csv(folder / "runs.csv", index=False)
    _refused(run("plan", *source, "--latency", "6s"), words)


@pytest.mark.parametrize(
    ("file", "content"),
    [("none.csv", None), ("runs.txt", "a,b"), ("empty.csv", ""), ("broken.jsonl", "{"), ("broken.parquet", "x")],
)
def test_a_table_that_cannot_be_read_is_refused(run, folder: Path, file: str, content: str | None) -> None:
    if content is not None:
        (folder / file).write_text(content)
    workflow = ["--workflow", folder / "workflow.toml"]
    _refused(run("plan", *workflow, "--runs", folder / file, "--latency", "6s"), "table is", file)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"schema": 0}', "{}", None])
@pytest.mark.parametrize("command", ["predict", "diff"])
def test_a_plan_file_that_is_none_is_refused(run, source, folder: Path, command: str, content: str | None) -> None:
    if content is not None:
        (folder / "bad.json").write_text(content)
    arguments = [*source, "--plan", folder / "bad.json"] if command == "predict" else [folder / "bad.json"] * 2
    _refused(run(command, *arguments), "is")


def test_a_plan_of_another_workflow_is_refused(run, source, folder: Path, plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"count"', '"sort"'))
    _refused(run("predict", *source, "--plan", plan_file), "stage is 'sort'")


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema": 99}', '{"schema": 1}', "nonsense"])
def test_a_model_file_that_is_none_is_refused(run, folder: Path, content: str) -> None:
    (folder / "model.json").write_text(content)
    source = ["--workflow", folder / "workflow.toml", "--runs", folder / "model.json"]
    _refused(run("plan", *source, "--latency", "6s"), "is")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plna"], "plna"),
        (["plan"], "--workflow"),
        (
            ["plan", "--workflow", "/no/such/workflow.toml", "--runs", "r.csv", "--latency", "6"],
            "/no/such/workflow.toml",
        ),
        (["diff", "only-one.json"], "AFTER"),
        (["prices", "gold"], "menu.prices is 'gold'"),
    ],
)
def test_a_command_line_that_is_none_is_refused(run, arguments: list[str], words: str) -> None:
    _refused(run(*arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--folds", "1"], "folds is 1"),
        (["--repeats", "0"], "repeats is 0"),
        (["--kind", "oracle"], "kind is 'oracle'"),
    ],
)
def test_an_evaluation_that_is_none_is_refused(run, source, arguments: list[str], words: str) -> None:
    _refused(run("evaluate", *source, *arguments), words)
