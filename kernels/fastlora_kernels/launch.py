# SPDX-License-Identifier: Apache-2.0
"""How a kernel is launched: on the tensors' own device, or in the interpreter.

Triton compiles or finds a program at a launch's first call, and is not asked again: later calls go
to that program's own launcher.
"""

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastlora_kernels.configs import Chip, Config, default_config, kind_of
from fastlora_kernels.locate import locate

# Read once by Triton when a kernel is decorated; later changes of the variable have no effect.
INTERPRETED = type(locate).__name__ == "InterpretedFunction"
if INTERPRETED:
    from fastlora_kernels import interpreter

    interpreter.install()

# The versions of Triton whose launchers may be called by `Launch`, and what those take.
KNOWN_TRITON = (3, 4) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
HEAD = ("self", "gridX", "gridY", "gridZ", "stream", "function")
TAIL = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


def default_of(
    kernel: str, xs: Sequence[Tensor], others: Sequence[Tensor], r: int, adapter: torch.dtype,
    dropout: bool, count: int = 1, result: tuple[int, Sequence[int]] | None = None,
) -> Callable[..., Config]:  # fmt: skip
    """Return what makes the default config of a ``kernel`` whose main loop reads these.

    Whether it can do so 16 bytes at a time matters: strides are 1 and a multiple of 16, and those
    of ``xs``, and of ``others``, lie the same way round.
    """
    aligned = all(
        1 in t.stride() and sum(t.stride()) % 16 == 1 and t.data_ptr() % 16 == 0
        for t in (*xs, *others)
    )
    aligned = aligned and all(len({t.stride(1) == 1 for t in ts}) == 1 for ts in (xs, others))
    case = kernel, kind_of(xs[0].dtype, adapter), r, dropout, Chip.of(xs[0].device), count, aligned
    return functools.partial(default_config, *case, result=result)


class _Recording(threading.local):
    done: list[tuple] | None = None  # where this thread records, what was done to tensors


recording = _Recording()


def noted(function: Callable, *args: Any) -> Any:
    """Call ``function`` on tensors, and keep what it took and made where somebody records."""
    made = function(*args)
    if recording.done is not None:
        recording.done.append((function, args, made))
    return made


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous tensor on the device of ``like``, of its dtype or another."""
    made = like.new_empty(shape, dtype=dtype)
    if recording.done is not None:  # to name a dtype would take longer than to have it
        recording.done.append((made.new_empty(0).new_empty, shape, made))
    return made


class Launch:
    """``kernel`` over ``grid`` with ``config``'s warps and stages; called with its tensors.

    The kernel's arguments are the tensors (or None, or tuples of them) and then ``rest``, all in
    its own order: names would take 5 µs more. A call goes through Triton, which compiles or finds a
    program; afterwards `ready` is what that program's own launcher takes to run it again, for
    tensors for which Triton would find the same one. What else a program is compiled for
    (``TRITON_DEBUG``) counts as at that call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], config: Config, *rest: Any) -> None:
        self.kernel, self.grid, self.config, self.rest = kernel, grid, config, rest
        self.empty, self.ready = 0 in grid, None

    def __call__(self, *tensors: Any) -> None:
        if not self.empty:
            noted(self._by_triton, *tensors)

    def _by_triton(self, *tensors: Any) -> None:
        run, first, config = self.kernel[self.grid], tensors[0], self.config
        first = first[0] if isinstance(first, tuple) else first
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if INTERPRETED:
            run(*tensors, *self.rest, **options)
            return
        if config.tma:
            run = functools.partial(_in_a_copy, run)
        with contextlib.ExitStack() as stack:
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                # Triton launches on the current device, which need not be the tensors'.
                stack.enter_context(torch.cuda.device(first.device))
            if first.is_cuda and torch.cuda.is_current_stream_capturing():
                stack.enter_context(_compiled_before())
            compiled = run(*tensors, *self.rest, **options)
            if _is_known(compiled):
                self._prepare(compiled)

    def _prepare(self, compiled: Any) -> None:
        run, head = compiled.run, (*self.grid, 1, 1)[:3]
        if self.config.tma:
            run = functools.partial(_in_a_copy, run)
        about = compiled.function, compiled.packed_metadata, None, None, None
        device = triton.runtime.driver.active.get_current_device()
        self.ready = Ready(run, head, about, self.rest, device, compiled)


class Ready(NamedTuple):
    """A program's own launcher, and what it takes: head, a stream, about, addresses and rest."""

    run: Callable
    head: tuple[int, ...]
    about: tuple
    rest: tuple
    device: int  # for which it was loaded
    compiled: Any  # Triton 3.9 unloads a program that nobody holds


def stream_of(launches: Sequence[Launch]) -> Callable[[], int | None]:
    """Return what says on which stream prepared launches run: None where Triton has to be asked.

    It tells hooks of a launch, and launches on another device than the current one.
    """
    driver, kernels = triton.runtime.driver.active, {launch.kernel for launch in launches}
    devices = {launch.ready.device for launch in launches}
    (device,) = devices if len(devices) == 1 else (None,)
    device_of, of_device = driver.get_current_device, driver.get_current_stream

    def stream() -> int | None:
        for kernel in kernels:
            if kernel.pre_run_hooks:
                return None
        return of_device(device) if _no_hooks() and device_of() == device else None

    return stream


def _is_known(compiled: Any) -> bool:
    """Return whether a program's launcher is one that takes what `Launch` gives it."""
    if compiled is None or not KNOWN_TRITON or torch.version.hip is not None:
        return False
    *names, last = inspect.signature(type(compiled.run).__call__).parameters.values()
    found = tuple(p.name for p in names)
    return last.kind is last.VAR_POSITIONAL and found in (HEAD, HEAD + TAIL)


def _no_hooks() -> bool:
    """Return whether nobody asked Triton to be told of launches; its hooks are chains by now."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return False
    return True


def _in_a_copy(run: Callable, *args: Any, **options: Any) -> Any:
    """Launch a kernel that keeps its tensor descriptors in device memory.

    In a copy of the context the caller's allocator stays what it is (not on Triton 3.4, which has
    one for the process).
    """

    def with_workspace() -> Any:
        triton.set_allocator(_workspace)
        return run(*args, **options)

    return contextvars.copy_context().run(with_workspace)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # at multiples of 512 bytes


_hook_lock = threading.Lock()


@contextlib.contextmanager
def _compiled_before() -> Iterator[None]:
    """Refuse to compile a kernel inside: loading code would break the graph being captured."""
    runtime, capturing = triton.knobs.runtime, threading.get_ident()
    with _hook_lock:
        before = runtime.jit_cache_hook

        def refuse(**asked: Any) -> bool | None:
            if threading.get_ident() != capturing:  # another thread compiles for itself
                return before(**asked) if before is not None else None
            raise RuntimeError(
                f"{asked['fn'].name} is not compiled for these dtypes and shapes, and cannot be "
                "while a CUDA graph is captured: run the same forward and backward once before"
            )

        runtime.jit_cache_hook = refuse
        try:
            yield
        finally:
            runtime.jit_cache_hook = before
