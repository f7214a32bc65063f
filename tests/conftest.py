"""The `gpu` marker, its skip where there is no Hopper GPU, and the device that most tests run on."""

import os

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU of compute capability 9.0 (Hopper)")
    # Tensors are small here: on a machine with other work, threads that wait for each other take minutes longer.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return
    skip = pytest.mark.skip(reason="no GPU of compute capability 9.0")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def all_threads():
    """As many threads as there are CPUs, for this test."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every path meets the same checks; where bounds differ, `problems.BOUNDS` says by how much."""
    return request.param
