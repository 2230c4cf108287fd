"""Stage-run tables on disk: ``.csv``, ``.parquet`` or ``.jsonl``, one row per stage and run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefect_slo.aws.objects import fetched, is_s3, stored
from prefect_slo.errors import InvalidObservation
from prefect_slo.observation import StageRuns

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet", ".jsonl")
NAMES = ("run_id", "stage", "hardware")
"""Columns that are text even where all of their values look like numbers."""


def read_table(path: str | Path, *, mb_per_vcpu: float = 1769.0) -> StageRuns:
    """Read a stage-run table; unknown columns are kept.

    Args:
        path: A ``.csv``, ``.parquet`` or ``.jsonl`` file, here or on S3 (``s3://bucket/key.csv``); ``.csv`` and
            ``.jsonl`` may be compressed (``.csv.gz``).
        mb_per_vcpu: Ties memory and vCPU where the table has only one of them.

    Raises:
        InvalidObservation: A missing or unreadable file, another suffix, a missing column, or a value that can't be a
            measurement.
        InvalidValue: An object on S3 that can't be read.
    """
    if is_s3(path):
        with fetched(str(path)) as local:
            return read_table(local, mb_per_vcpu=mb_per_vcpu)
    table = _read(Path(path))
    if table.empty:
        raise InvalidObservation("table", str(path), "at least one row")
    return StageRuns.from_table(table, mb_per_vcpu=mb_per_vcpu)


def write_table(stage_runs: StageRuns, path: str | Path) -> None:
    """Write a stage-run table that ``read_table`` reads back to the same rows.

    Columns that say nothing (all unknown) are left out.

    Raises:
        InvalidObservation: Another suffix, or a folder that can't be written.
        InvalidValue: An object on S3 that can't be written.
    """
    if is_s3(path):
        with stored(str(path)) as local:
            return write_table(stage_runs, local)
    path, table = Path(path), to_pandas(stage_runs)
    kind = _kind(path)
    try:
        if kind == ".csv":
            table.to_csv(path, index=False)
        elif kind == ".jsonl":
            table.to_json(path, orient="records", lines=True, double_precision=15)
        else:
            table.to_parquet(path, index=False)
    except ImportError:
        raise _no_parquet(path) from None
    except OSError as error:
        raise InvalidObservation("table", str(path), f"a file that can be written ({error})") from None


def to_pandas(stage_runs: StageRuns) -> pd.DataFrame:
    """The rows as a pandas table, columns that say nothing left out."""
    import pandas as pd

    columns = {name: column for name, column in stage_runs.columns.items() if not _all_unknown(column)}
    extra = {name: column for name, column in stage_runs.extra.items() if name not in columns}
    return pd.DataFrame({**columns, **extra})


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    kind = _kind(path)
    if not path.is_file():
        raise InvalidObservation("table", str(path), "a file that exists")
    try:
        if kind == ".csv":
            return pd.read_csv(path, converters=dict.fromkeys(NAMES, str))  # a stage may be called "NA"
        if kind == ".jsonl":
            return pd.read_json(path, lines=True, dtype=dict.fromkeys(NAMES, str))
        return pd.read_parquet(path)
    except ImportError:
        raise _no_parquet(path) from None
    except pd.errors.EmptyDataError:
        raise InvalidObservation("table", str(path), "a header and at least one row") from None
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise InvalidObservation("table", str(path), f"a readable {kind} file ({error})") from None


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in suffixes[-2:] if suffix in SUFFIXES), None)
    if kind is None:
        raise InvalidObservation("table", str(path), f"a file that ends in {', '.join(SUFFIXES)}")
    return kind


def _no_parquet(path: Path) -> InvalidObservation:
    return InvalidObservation("table", str(path), "pyarrow to be installed: pip install 'prefect-slo[parquet]'")


def _all_unknown(column: np.ndarray[Any, Any]) -> bool:
    return column.dtype.kind == "f" and len(column) > 0 and bool(np.isnan(column).all())
