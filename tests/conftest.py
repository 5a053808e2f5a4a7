"""Eight simulated CPU devices for the whole suite, and compilations kept between runs."""

from __future__ import annotations

import getpass
import os
import platform
import sys
import tempfile
from pathlib import Path

# Before the first import of jax: its backend reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
# A program runs a few steps of a tiny model: nearly all of its time is compilation. Without LLVM's optimizations, and
# with the older emitters of loops, that takes a third (a step of a tiny DeepSeek on 8 devices: 3.0 of 9.6 s of a core).
# What XLA makes of the program, its fusions, collectives and buffers, stays. Options of a backend that another version
# does not know it passes over. Processes that tests start have the compiler as it is for a run, and its exact bits.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

import jax
import pytest


def _compilation_cache() -> str:
    """A folder of this user, machine, Python and jax: compiled CPU code does not suit other processors."""
    machine = f"{platform.node()}-{platform.machine()}-py{sys.version_info.major}{sys.version_info.minor}"
    folder = Path(tempfile.gettempdir()) / f"maxlm-tests-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)  # what lies in it is run: nobody else may write there
    return str(folder / f"{machine}-jax{jax.__version__}")


# The environment, so that the processes that tests start use it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compilation_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test does not join the cluster whose variables happen to be set around it."""
    for name in ("MAXLM_COORDINATOR", "MAXLM_NUM_PROCESSES", "MAXLM_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
