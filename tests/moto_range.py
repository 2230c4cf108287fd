"""The test bed at both ends of the range of moto that it supports.

``python tests/moto_range.py`` installs the lowest version that ``pyproject.toml`` names beside the environment's own,
and runs the tests of the test bed and of AWS with it, then with what the environment has. Needs the package index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests/testing", "tests/aws")


def lowest() -> str:
    """The lowest version of moto that the extra ``testing`` allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [wanted] = [each for each in project["optional-dependencies"]["testing"] if each.startswith("moto")]
    found = re.search(r">=\s*([\d.]+)", wanted)
    assert found is not None, wanted
    parts = found.group(1).split(".")
    return ".".join([*parts, *["0"] * (3 - len(parts))])


def main() -> int:
    """Run both ends; the exit status of the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*install, f"moto=={lowest()}"], check=True)
        for path in (folder, ""):
            environment = {**os.environ, "PYTHONPATH": path}
            said = "import moto; print('moto', moto.__version__)"
            subprocess.run([sys.executable, "-c", said], env=environment, check=True)
            tests = [sys.executable, "-m", "pytest", "-q", *FOLDERS]
            if status := subprocess.run(tests, env=environment, cwd=ROOT, check=False).returncode:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
