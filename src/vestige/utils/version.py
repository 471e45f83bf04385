"""The version of the package, to be read without importing anything else."""

__version__ = "0.1.0"
