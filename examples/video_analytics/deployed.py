"""The flow by a plan from a file, as a deployment runs it: its job variables say where the plan and the storage are."""

import os
from pathlib import Path

from flow import planned

from prefect_slo import Plan

plan = Plan.from_json(Path(os.environ["VIDEO_PLAN"]).read_text(encoding="utf-8"))
video_analytics = planned(plan, os.environ["VIDEO_STORAGE"], os.environ.get("VIDEO_DEVICE", "cupy"))
