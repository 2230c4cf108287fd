"""Runs a flow by its plan: the task runner, the graph it learns, and the backends that bundles run on."""
