"""Commands, one module per group; see ``prefect_slo.cli``."""
