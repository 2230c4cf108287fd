"""Entry point: run a command, turn what went wrong into one line and an exit code."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from cyclopts import CycloptsError

from prefect_slo.cli import commands
from prefect_slo.cli.api_trouble import api_trouble
from prefect_slo.cli.app import app
from prefect_slo.cli.output import print_json
from prefect_slo.errors import InfeasibleSlo, SloError

DONE, ERROR, INFEASIBLE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` are the process's own by default.

    ``PREFECT_SLO_TRACEBACK=1`` lets errors through, for reports of defects.
    """
    for module in iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}")
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError as error:
        return UNREAD if _unread() else _failed(str(error) or type(error).__name__)
    except InfeasibleSlo as error:
        return _infeasible(error, as_json="--json" in tokens)
    except (SloError, CycloptsError, OSError) as error:
        return _failed(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get("PREFECT_SLO_TRACEBACK"):
            raise
        if trouble := api_trouble(error):
            return _failed(trouble)
        return _failed(f"{type(error).__name__}: {error} (a defect; PREFECT_SLO_TRACEBACK=1 shows where)")
    return code if isinstance(code, int) else DONE


def _unread() -> bool:
    """Whether nobody reads standard output any more: whoever did has enough, as head does."""
    try:
        sys.stdout.flush()
        gone = _hung_up(sys.stdout.fileno())
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # it is no file
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or its last flush would complain
    return gone


def _hung_up(file: int) -> bool:
    """Whether the other end of a pipe is closed: what could not be written to it may be gone, and flushes no more."""
    if not hasattr(select, "poll"):
        return False
    looked = select.poll()
    looked.register(file, 0)
    return any(what & (select.POLLERR | select.POLLHUP) for _, what in looked.poll(0))


def _infeasible(error: InfeasibleSlo, *, as_json: bool) -> int:
    if as_json:
        nearest = error.nearest
        print_json(
            {
                "feasible": False,
                "objective": error.objective,
                "nearest": None
                if nearest is None
                else {"bound": nearest.bound, "latency_s": nearest.latency_s, "cost_usd": nearest.cost_usd},
                "bottleneck": error.bottleneck,
                "share": error.share,
            }
        )
        return INFEASIBLE
    return _failed(str(error), INFEASIBLE)


def _failed(message: str, code: int = ERROR) -> int:
    print(f"prefect-slo: {' '.join(message.split())}", file=sys.stderr)
    return code
