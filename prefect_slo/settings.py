"""Settings, as Prefect's own: ``PREFECT_INTEGRATIONS_SLO_*``, ``prefect.toml``, ``pyproject.toml`` or a profile."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from prefect.logging import get_logger
from prefect.settings import PREFECT_HOME, get_current_settings
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prefect_slo.resources import Capacity

Mode = Literal["observe", "advise", "enforce"]


class SLOSettings(PrefectBaseSettings):
    """What holds for every flow of this environment. Make one where it is needed; it reads the environment then.

    Example:
        ``PREFECT_INTEGRATIONS_SLO_ENABLED=false`` turns everything off: flows run as if they were not decorated.
    """

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "slo"))

    enabled: bool = Field(default=True, description="Whether decorated flows are observed, planned and sized at all.")
    mode: Mode | None = Field(
        default=None, description="Mode of every flow, above what its decorator says: observe, advise or enforce."
    )
    telemetry: bool = Field(default=True, description="Whether runs are recorded, and learned from.")
    home: Path | None = Field(
        default=None, description="Folder for logs of runs under way; PREFECT_HOME/slo where it isn't set."
    )
    capacity_vcpus: float | None = Field(
        default=None, gt=0, description="vCPUs that one run may use: menus, plans and dispatching stay within it."
    )
    capacity_memory_mb: float | None = Field(
        default=None, gt=0, description="Memory, in MB, that menus and plans of one run stay within."
    )
    capacity_workers: int | None = Field(default=None, gt=0, description="Workers that plans of one run use at once.")
    gpu_devices: str = Field(
        default="",
        description="GPUs of this machine as name:memory_mb, e.g. '0:16384,1:16384', in place of those that nvidia-smi "
        "lists; 'none' where none is to be used.",
    )
    ledger_patience_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a worker waits for its share of this machine's vCPUs before it starts without one.",
    )
    plan: str | None = Field(
        default=None,
        description="Plan that runs follow: the name of an slo-plan block, or a plan file; else the one in force.",
    )
    min_change: float = Field(
        default=0.05, ge=0, lt=1, description="A plan that is better by less than this share doesn't replace another."
    )
    max_change: float | None = Field(
        default=None,
        gt=0,
        description="A plan that changes latency, cost or vCPUs by more than this share is proposed, and not adopted.",
    )
    fold_timeout_s: float = Field(
        default=120.0, gt=0, description="How long a sweep or a refit waits for others that write the same profile."
    )

    @property
    def directory(self) -> Path:
        """Folder for logs of runs under way."""
        return (self.home or PREFECT_HOME.value() / "slo").expanduser()

    @property
    def telemetry_directory(self) -> Path:
        """Where ``RunLog`` writes and ``sweep_orphans`` looks: each API has a folder of its own."""
        return self.directory / "telemetry" / api_identity()

    @property
    def named_gpus(self) -> tuple[str, ...]:
        """The devices that are named."""
        return tuple(entry.strip() for entry in self.gpu_devices.split(",") if entry.strip())

    @property
    def capacity(self) -> Capacity:
        """The limits that are set; what isn't has no limit here."""
        return Capacity(self.capacity_vcpus, self.capacity_memory_mb, self.capacity_workers)


def api_identity() -> str:
    """Names the API that the current settings lead to: its host and a hash, fit for the name of a folder.

    A server at an address is that address. A server of Prefect's own that comes and goes with its process has another
    port each time: it is the database that it serves.
    """
    settings = get_current_settings()
    address = (settings.api.url or "").rstrip("/")
    host, named = urlsplit(address).hostname or "api", address
    if not address:
        database = settings.server.database.connection_url
        host, named = "local", database.get_secret_value() if database is not None else str(settings.home)
    return f"{host}-{hashlib.blake2b(named.encode(), digest_size=6).hexdigest()}"


def valid_settings() -> SLOSettings | None:
    """The settings of this environment; ``None`` where one holds a value that it may not, which is said once.

    For code that a flow runs through: a slip in the environment must not fail flows.
    """
    try:
        return SLOSettings()
    except ValueError as error:
        message = str(error)
        with _lock:
            new = message not in _said
            _said.add(message)
        if new:
            get_logger("slo").warning("Settings of prefect-slo are not valid; flows run as without it. %s", message)
        return None


_said: set[str] = set()
_lock = threading.Lock()
