"""Prefect blocks: what is known of a flow, documents that flows share (menus, price lists), and where data lies."""

from __future__ import annotations

from prefect_slo.blocks.documents import MenuBlock, PlanBlock, PriceListBlock
from prefect_slo.blocks.folding import Fit, fold_in, rebuild_profile, update_profile
from prefect_slo.blocks.plans import plan_from_history, propose, put_in_force
from prefect_slo.blocks.pools import PoolBlock
from prefect_slo.blocks.profile import SLOProfile
from prefect_slo.blocks.storage import S3PrefixBlock

__all__ = [
    "Fit",
    "MenuBlock",
    "PlanBlock",
    "PoolBlock",
    "PriceListBlock",
    "S3PrefixBlock",
    "SLOProfile",
    "fold_in",
    "plan_from_history",
    "propose",
    "put_in_force",
    "rebuild_profile",
    "update_profile",
]
