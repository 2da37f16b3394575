"""What pytest-benchmark does not save of the machine by itself."""

from importlib.metadata import PackageNotFoundError, version

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["versions"] = {}
    for name in ("torch", "diffusers", "transformers", "minialign"):
        try:
            machine_info["versions"][name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    machine_info["threads"] = torch.get_num_threads()
