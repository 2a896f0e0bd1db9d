"""host.use_cpu redirects CUDA once, and only where an entry point asks for it."""

import platform
import statistics
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cuda_literals_mean_the_cpu_after_the_call():
    printed = run_python(
        """
import torch
from megatron_dmc.seam import host
host.use_cpu(); host.use_cpu()
made = [torch.zeros(1, device="cuda"), torch.ones(1, device=torch.cuda.current_device()), torch.ones(1).to("cuda"),
        torch.ones(1).cuda(), torch.empty(1, device=0, pin_memory=True)]
print({tensor.device.type for tensor in made}, made[0].type(), torch.cuda.memory_allocated())
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.synchronize()
torch.cuda.manual_seed(3); first = torch.rand(1)
torch.cuda.manual_seed(3); print(torch.equal(first, torch.rand(1)))
"""
    )
    assert printed.split("\n")[:2] == ["{'cpu'} torch.cuda.FloatTensor 0", "True"]


def test_megatron_keeps_a_random_state_per_axis():
    printed = run_python(
        """
from megatron_dmc.seam import host
host.use_cpu()
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
tracker = CudaRNGStatesTracker()
torch.manual_seed(1); tracker.add("axis", 7)
with tracker.fork("axis"):
    inside = torch.rand(1)
outside = torch.rand(1)
torch.manual_seed(1); alone = torch.rand(1)
states = {name: state.clone() for name, state in tracker.get_states().items()}
with tracker.fork("axis"):
    later = torch.rand(1)
tracker.set_states(states)
with tracker.fork("axis"):
    again = torch.rand(1)
print(torch.equal(outside, alone), torch.equal(inside, later), torch.equal(later, again))
"""
    )
    assert printed.strip().split("\n")[-1] == "True False True"


def test_importing_the_package_redirects_nothing():
    printed = run_python(
        "import torch, megatron_dmc, megatron_dmc.seam.host; print(type(torch.cuda.synchronize).__name__)"
    )
    assert printed.strip() == "function"


def test_too_late_is_an_error():
    printed = run_python(
        """
import megatron.core
from megatron_dmc.seam import host
try:
    host.use_cpu()
except RuntimeError as error:
    print(error)
"""
    )
    assert "before megatron.core is imported" in printed


def page_faults(**asked):
    """Of making and freeing a tensor of 64 MB, at first and on average after twenty."""
    printed = run_python(
        f"""
import resource, torch
from megatron_dmc.seam import host
host.keep_memory({asked})
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(40)])
"""
    )
    counts = [int(count) for count in printed.split()]
    return counts[0], statistics.mean(counts[20:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_freed_tensors_is_used_again():
    first, later = page_faults()
    assert first > 4 * later


@pytest.mark.parametrize("asked", [{"MALLOC_ARENA_MAX": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=3"}])
def test_what_a_user_asks_of_malloc_stays(asked):
    first, later = page_faults(**asked)
    assert later > first / 2
