# SPDX-License-Identifier: Apache-2.0
"""How a kernel is launched: on the tensors' own device, or in the interpreter.

Everything but pointers is worked out once for operands of the same sizes that lie in the same way
(`planned`); the compiled program is then run by its own launcher (`Launch`), Triton not asked.
"""

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
MOST_PLANS = 4096  # of a launcher: lengths may be endless


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


# What the key of a plan holds as it is; all else is a tensor.
_PLAIN = {type(None), bool, int, float, str, Config}


def planned(prepare: Callable[..., Callable]) -> Callable:
    """Return a launcher that has ``prepare(*args)`` make what runs ``args``, and keeps it.

    Arguments are tensors, numbers, None, a `Config`, or tuples of such. What was made runs all
    arguments of which everything is the same but where tensors lie, to 16 bytes.
    """
    plans: dict[tuple, Callable] = {}

    @functools.wraps(prepare)
    def launcher(*args: Any) -> Any:
        if INTERPRETED:
            return prepare(*args)(*args)
        key: list = []
        for arg in args:
            if type(arg) is tuple:
                key.append(len(arg))
            else:
                arg = (arg,)
            for value in arg:
                if type(value) in _PLAIN:
                    key.append(value)
                else:
                    at = value.data_ptr() & 15
                    key += value.shape, value.stride(), value.dtype, at, value.get_device()
        asked = tuple(key)
        run = plans.get(asked)
        if run is None:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            run = plans[asked] = prepare(*args)
        return run(*args)

    launcher.plans = plans
    return launcher


class Launch:
    """``kernel`` over ``grid`` with ``config``'s warps and stages; called with its tensors.

    The kernel's arguments are the tensors (or None, or tuples of them) and then ``rest``, all in
    its own order: names would take 5 µs more. The first call goes through Triton, which compiles or
    finds a program; others, of tensors for which it would find the same one, to that program's own
    launcher. What else a program is compiled for (``TRITON_DEBUG``) counts as at the first call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], config: Config, *rest: Any) -> None:
        self.kernel, self.grid, self.config, self.rest = kernel, grid, config, rest
        self.empty, self.ready = 0 in grid, None

    def __call__(self, *tensors: Any) -> None:
        if self.empty:
            return
        if self.ready is not None:
            run, head, index, device_of, stream_of, function, metadata = self.ready
            if _no_hooks() and not self.kernel.pre_run_hooks and device_of() == index:
                about = stream_of(index), function, metadata, None, None, None
                run(*head, *about, *_addresses(tensors), *self.rest)
                return
        self._by_triton(*tensors)

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
        """Keep what a call of ``compiled`` takes on the current device."""
        driver, run = triton.runtime.driver.active, compiled.run
        if self.config.tma:
            run = functools.partial(_in_a_copy, run)
        index, head = driver.get_current_device(), (*self.grid, 1, 1)[:3]
        device = index, driver.get_current_device, driver.get_current_stream
        self.ready = run, head, *device, compiled.function, compiled.packed_metadata
        self.compiled = compiled  # Triton 3.9 unloads what nobody holds


def _addresses(tensors: Sequence) -> list:
    """Return what Triton's launcher would ask the tensors for; it takes addresses instead."""
    found: list = []
    for t in tensors:
        inside = type(t) is tuple
        found.append(tuple(_addresses(t)) if inside else None if t is None else t.data_ptr())
    return found


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
