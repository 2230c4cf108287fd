"""The backends of one flow run by pool name: worker processes that the whole process shares, threads, other pools."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from functools import cache
from types import MappingProxyType
from typing import Any

from prefect.settings import get_current_settings

from prefect_slo.errors import InvalidValue
from prefect_slo.placement import Device
from prefect_slo.runner.backends.protocol import Backend
from prefect_slo.runner.backends.threads import ThreadBackend
from prefect_slo.runner.local.gpus import devices
from prefect_slo.runner.local.keeping import PATIENCE_S
from prefect_slo.runner.local.limits import machine_memory_mb, machine_vcpus
from prefect_slo.runner.pools import PROCESS, THREAD, Pools
from prefect_slo.runner.preload import PRELOAD
from prefect_slo.settings import valid_settings

logger = logging.getLogger(__name__)


class FlowBackends(Mapping[str, Backend]):
    """``process``, ``thread`` and the flow's own pools, made when first asked for.

    Settings are those in force where this is made.

    Args:
        client: The flow run's API client: workers are told its address, else each would start a server of its own.
        pools: The flow's pools beyond this machine's.
    """

    def __init__(self, client: Any = None, pools: Pools = MappingProxyType({})) -> None:
        self._client, self._pools, self._context = client, pools, copy_context()
        self._made: dict[str, Backend] = {}

    def __getitem__(self, pool: str) -> Backend:
        if pool not in self._made:
            self._made[pool] = self._make(pool)
        return self._made[pool]

    def __iter__(self) -> Iterator[str]:
        return iter((PROCESS, THREAD, *self._pools))

    def __len__(self) -> int:
        return 2 + len(self._pools)

    def processes_available(self) -> bool:
        """Whether this machine can have worker processes."""
        from prefect_slo.runner.backends.processes import ProcessBackend

        return ProcessBackend.available()

    def close(self) -> None:
        """Let go of what belongs to this flow run; worker processes stay warm for the next."""
        for pool, backend in self._made.items():
            try:
                backend.shutdown()
            except Exception:  # the flow is over, and the other pools still have to be
                logger.warning("Pool %r could not be shut down in an orderly way.", pool, exc_info=True)
        self._made.clear()

    def _make(self, pool: str) -> Backend:
        if pool == THREAD:
            return ThreadBackend()
        if pool == PROCESS:
            from prefect_slo.runner.backends.processes import ProcessBackend

            env = self._context.run(worker_environment, self._client)
            settings = self._context.run(valid_settings)
            patience_s = settings.ledger_patience_s if settings is not None else PATIENCE_S
            named = self._context.run(named_gpus)
            return ProcessBackend.shared(env=env, preload=PRELOAD, patience_s=patience_s, gpu_devices=named)
        return self._context.copy().run(self._pools[pool].backend, self._client)


def worker_environment(client: Any) -> dict[str, str]:
    """Prefect's settings as environment variables, with the address of the API that the flow run talks to."""
    env = get_current_settings().to_environment_variables(exclude_unset=True)
    address = getattr(client, "api_url", None)
    if address is not None:
        env["PREFECT_API_URL"] = str(address)
    env["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "false"
    return env


def usable_vcpus() -> float:
    """vCPUs that runs of this process may use: the machine's, its control group's, or what the settings allow."""
    settings = valid_settings()
    return min(machine_vcpus(), (settings.capacity_vcpus if settings is not None else None) or math.inf)


def usable_gpus() -> tuple[Device, ...]:
    """GPUs that they may use: those that the settings name, else those that the machine shows; looked for once."""
    try:
        return devices(named_gpus())
    except InvalidValue as error:  # a slip in the environment must not fail flows
        _warn_once(f"No GPU of this machine is used: {error}")
        return ()


def named_gpus() -> tuple[str, ...]:
    """GPUs that the settings name; none where they leave it to the machine."""
    settings = valid_settings()
    return settings.named_gpus if settings is not None else ()


def usable_memory_mb() -> int:
    """Memory that they may use, in MB; likewise."""
    settings = valid_settings()
    return int(min(machine_memory_mb(), (settings.capacity_memory_mb if settings is not None else None) or math.inf))


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
