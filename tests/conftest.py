"""Flags of XLA, set before JAX starts: eight CPU devices for the tests of sharding, whatever else the machine has, and
quick compilation, which is most of a test's time on a CPU; no process takes all memory of a GPU. Tests that need a GPU
are skipped where there is none.
"""

import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
