"""What every test can ask for: a device and a seed. Kernels run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os

# Threads that wait for each other spin; where other programs want the same cores, a test of a second takes minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch brings OpenMP

HAS_TORCH = importlib.util.find_spec("torch") is not None

if HAS_TORCH:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of a kernel

import pytest  # noqa: E402  Triton reads the variable above when it is imported, also by a pytest plugin

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.interpreter import remember_builtins

    remember_builtins()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=HAS_TORCH)
def _seeded() -> None:
    """Every test starts from one seed, and memory that nobody wrote reads as NaN (integers: the largest)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
