"""Give a Prefect flow a deadline or a budget; it sizes itself."""

from __future__ import annotations

__version__ = "0.1.0"
