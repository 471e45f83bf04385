"""The version, and the package as a command."""

import subprocess
import sys
import tomllib
from pathlib import Path

import vestige
from vestige.utils.version import __version__


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert vestige.__version__ == __version__ == project["version"]


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "vestige", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"vestige {__version__}\n")
