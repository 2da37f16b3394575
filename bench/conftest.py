"""The device and dtype that are measured, and what pytest-benchmark does not save of the machine by itself."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pairs
import pytest
import torch
from counts import on_meta


def pytest_addoption(parser):
    group = parser.getgroup("minialign")
    group.addoption("--device", default="cpu", help="cpu, cuda, or meta: the same code without arithmetic")
    group.addoption("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the arithmetic")


def pytest_configure(config):
    """Synchronised timing: pytest-benchmark's own clock becomes that of the device."""
    name = config.getoption("--device")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "meta"):  # others would be timed without waiting for them
        raise pytest.UsageError(f"--device {name}: accepted: cpu, cuda, cuda:N, meta")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here; accepted: cpu, meta")
    if device.index is not None:
        torch.cuda.set_device(device)
    config.minialign_clock = pairs.clock_of(device)


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=config.minialign_clock))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["versions"] = {}
    for name in ("torch", "diffusers", "transformers", "minialign"):
        try:
            machine_info["versions"][name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    machine_info["threads"] = torch.get_num_threads()
    device = torch.device(config.getoption("--device"))
    machine_info["device"], machine_info["dtype"] = device.type, config.getoption("--dtype")
    if device.type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name(device)


@pytest.fixture(scope="session")
def device(request):
    device = torch.device(request.config.getoption("--device"))
    if device.type == "meta":
        with on_meta():
            yield device
    else:
        yield device


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(scope="session")
def clock(request):
    """Of the device: pytest-benchmark's own."""
    return request.config.minialign_clock


@pytest.fixture(scope="session")
def host(device, dtype):
    """For what has nothing to do with the device and the dtype."""
    if device.type != "cpu" or dtype != torch.float32:
        pytest.skip("measured with --device cpu --dtype float32")


@pytest.fixture(params=["minialign", "peer"])
def compare(request, benchmark, device, dtype, clock):
    """`pairs.compare`, which makes two entries of pytest-benchmark, one a side."""
    return partial(pairs.compare, benchmark, request.param, clock, partial(pairs.limits, device, dtype, clock))
