"""Memory that is left, by the books of the machine and of control groups."""

import pytest

from megatron_dmc.support.memory import available_memory

GIB = 1 << 30


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8 GiB free."""
    psutil = pytest.importorskip("psutil")
    free = type("Memory", (), {"available": 8 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    return tmp_path


def group(folder, limit, use, stat=0, version=2):
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    write(folder / names[0], limit)
    write(folder / names[1], use)
    write(folder / "memory.stat", f"anon 1\n{names[2]} {stat}")


def test_without_groups_the_machine_counts(machine):
    assert available_memory(machine) == 8 * GIB


def test_every_group_around_the_process_counts(machine):
    write(machine / "proc/self/cgroup", "0::/outer/inner")
    top = machine / "sys/fs/cgroup"
    group(top / "outer/inner", "max", GIB)
    group(top / "outer", 4 * GIB, 3 * GIB, stat=GIB // 2)
    assert available_memory(machine) == GIB + GIB // 2
    group(top / "outer/inner", 2 * GIB, GIB)
    assert available_memory(machine) == GIB
    group(top / "outer/inner", GIB, 2 * GIB)
    assert available_memory(machine) == 0


def test_groups_of_the_first_version(machine):
    write(machine / "proc/self/cgroup", "9:cpuset:/a\n4:cpu,memory:/a/b\n0::/")
    group(machine / "sys/fs/cgroup/cpuset/a", 1, 0, version=1)
    group(machine / "sys/fs/cgroup/memory/a/b", 3 * GIB, GIB, version=1)
    group(machine / "sys/fs/cgroup/memory", 1 << 63, GIB, version=1)
    assert available_memory(machine) == 2 * GIB


def test_a_path_of_the_host_leaves_the_outermost_group(machine):
    write(machine / "proc/self/cgroup", "0::/not/visible/here")
    group(machine / "sys/fs/cgroup", 5 * GIB, GIB)
    assert available_memory(machine) == 4 * GIB


def test_this_machine_has_some():
    assert available_memory() > 0
