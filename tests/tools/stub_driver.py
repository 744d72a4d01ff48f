# SPDX-License-Identifier: Apache-2.0
"""Triton's own binder and launcher without a GPU, on a driver that only remembers (stub_driver.c).

In a process in which the interpreter is off. Tensors lie in a CPU's memory.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import aot
import torch
import triton
from fastlora_kernels.configs import Chip
from triton.backends.nvidia import driver as nvidia

CAPABILITIES = (80, 89, 90, 100)  # of the devices: 0 is of sm_80
COMPILER = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")


class Parameter(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint), ("size", ctypes.c_uint))


class Program(ctypes.Structure):
    """What was loaded; ``parameters`` as the assembler has noted them."""

    _fields_ = (
        *(("name", ctypes.c_char * 128), ("device", ctypes.c_int), ("most_shared", ctypes.c_uint)),
        *(("count", ctypes.c_uint), ("parameters", Parameter * 1024)),
    )


class Launched(ctypes.Structure):
    """What was launched: two that are the same are so byte for byte."""

    _fields_ = (
        *(("program", ctypes.POINTER(Program)), ("stream", ctypes.c_uint64)),
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(("attributes", ctypes.c_uint), ("parameters", ctypes.c_ubyte * 4096)),
    )


def unusable() -> str | None:
    """Return why nothing can be launched here: Triton compiles its launcher in C, for Python."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    needed = {"a C compiler": COMPILER, str(header): header.is_file()}
    return next((f"needs {what}" for what, there in needed.items() if not there), None)


class Devices:
    """Devices of `CAPABILITIES`, on which Triton launches from here on.

    ``current`` is the current one, ``streams`` holds the current stream of each. ``home`` is where
    tensors lie, as far as anybody asks (`hold_tensors`); while ``capturing`` a graph is captured.
    ``memory`` has what was asked for by device, for descriptors: once for each size.
    """

    def __init__(self, current: int) -> None:
        self.home, self.current, self.capturing = current, current, False
        self.streams = [100 * (device + 1) for device in range(len(CAPABILITIES))]
        self.folder = tempfile.TemporaryDirectory()
        self.stub = loaded(Path(self.folder.name))
        most = (ctypes.c_int * len(CAPABILITIES)).in_dll(self.stub, "stub_shared_memory")
        most[:] = [aot.CHIPS[capability].shared_memory for capability in CAPABILITIES]
        self.exchange(current)
        self.driver = nvidia.CudaDriver()
        self.driver.get_current_device = lambda: self.current
        self.driver.get_current_stream = lambda device: self.streams[device]
        self.driver.get_device_capability = lambda device: divmod(CAPABILITIES[device], 10)
        triton.runtime.driver.set_active(self.driver)
        torch.empty, self.memory = functools.partial(self.empty, torch.empty), {}
        Chip.of = staticmethod(lambda device: aot.CHIPS[CAPABILITIES[self.home]])

    def empty(self, make: Callable, *size: int, device=None, **options) -> torch.Tensor:
        """Return what ``make``, which is `torch.empty`, would, or memory of a device."""
        if device != "cuda":
            return make(*size, device=device, **options)
        return self.memory.setdefault(size, make(*size, **options))

    def exchange(self, current: int) -> int:
        """Make another device the current one, and return which was."""
        before, self.current = self.current, current
        ctypes.c_int.in_dll(self.stub, "stub_current").value = current
        return before

    def launched(self) -> list[Launched]:
        """Return what was launched since this was asked before."""
        count = ctypes.c_uint.in_dll(self.stub, "stub_count")
        found = (Launched * 64).in_dll(self.stub, "stub_launches")
        made = [Launched.from_buffer_copy(one) for one in found[: count.value]]
        count.value = 0
        return made

    def hold_tensors(self) -> None:
        """Have all tensors say that they are of the device ``home``, and PyTorch know these."""
        torch.Tensor.is_cuda = True
        torch.Tensor.device = property(lambda t: torch.device("cuda", self.home))
        torch.Tensor.get_device = lambda t: self.home
        cuda = torch.cuda
        cuda.current_device = lambda: self.current
        cuda._exchange_device = cuda._maybe_exchange_device = self.exchange
        cuda.is_current_stream_capturing = lambda: self.capturing


def loaded(folder: Path) -> ctypes.CDLL:
    """Return the stub, made in ``folder``, as the libcuda.so.1 of this process."""
    library, headers = folder / "libcuda.so.1", [f"-I{path}" for path in nvidia.include_dirs]
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-w", *headers, f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, Path(__file__).with_suffix(".c"), "-o", library], check=True)
    (folder / "libcuda.so").symlink_to(library)  # the name that Triton 3.4 links to
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
