"""The command line, ``prefect-slo``: one module per group of commands in ``commands/``.

A module of commands imports ``app``, decorates its functions with ``@app.command``, and is found by lying there. Heavy
imports belong inside the functions, so that ``--help`` stays quick.
"""

from __future__ import annotations

from prefect_slo.cli.main import main

__all__ = ["main"]
