"""``python -m prefect_slo.worker s3://bucket/key``: run one event where this package is installed, on AWS Batch."""

from __future__ import annotations

import sys

from prefect_slo.aws.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
