"""The application that commands register with."""

from __future__ import annotations

from cyclopts import App

from prefect_slo import __version__

app = App(
    name="prefect-slo",
    help="Give a Prefect flow a deadline or a budget; it sizes itself.",
    help_epilogue="Exit codes: 0 done, 2 the bound cannot be met by any plan, 1 any other error.",
    version=__version__,
    result_action="return_value",
)
