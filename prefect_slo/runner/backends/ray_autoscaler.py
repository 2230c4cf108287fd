"""Whether a Ray cluster has an autoscaler, by what Ray keeps of it on the cluster's head.

Ray watches every cluster that was started by ``ray start``. Of one that was put together by hand it makes up a type for
each node, ``node_<id>``; nodes that an autoscaler starts are of its own types, and of its own instances.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_STATUS, _ERROR = b"__autoscaling_status", b"__autoscaling_error"
_BY_HAND = re.compile(r"node_[0-9a-f]{56}")
"""Ids of nodes have 28 bytes; ``node_cpu`` is a type that somebody has named."""


def autoscales() -> bool:
    """Whether the cluster that this process is connected to has one that is at work, as far as Ray says."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return names_its_nodes(get_cluster_status(ray.get_runtime_context().gcs_address))
    written = _internal_kv_get(_STATUS)
    return bool(written) and not _internal_kv_get(_ERROR) and names_its_types(json.loads(written))


def names_its_types(status: Mapping[str, Any]) -> bool:
    """Whether the status that Ray's first autoscaler writes down speaks of types of nodes that somebody has named."""
    report = status.get("autoscaler_report") or {}
    types = {*(report.get("active_nodes") or {}), *(report.get("node_type_mapping") or {}).values()}
    return any(_BY_HAND.fullmatch(kind) is None for kind in types)


def names_its_nodes(status: Any) -> bool:
    """Whether Ray's second autoscaler has reported, and a node is one of its instances, by a ``ClusterStatus``."""
    nodes = (*status.active_nodes, *status.idle_nodes)
    return int(status.stats.autoscaler_version or 0) > 0 and any(node.instance_id for node in nodes)
