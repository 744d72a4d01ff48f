# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around the package: killed processes, full disks, too little memory, forks.

Each fault leaves files that are old or new and whole, and a process whose next call is right.
"""

from __future__ import annotations

import builtins
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastlora
from fastlora import files
from fastlora.files import replace_file
from fastlora.layers import gated, siblings
from fastlora.operator import blocks, measured
from fastlora.operator.measured import OPS, Timing
from fastlora.operator.plans import Problem

CPU = torch.device("cpu")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def model(value: float) -> PeftModel:
    """A model whose adapter and its alpha both hold ``value``."""
    config = LoraConfig(r=1, lora_alpha=value, target_modules=["0"])
    made = get_peft_model(nn.Sequential(nn.Linear(6, 6)), config)
    with torch.no_grad():
        made.base_model.model[0].lora_B["default"].weight.fill_(value)
    return made


class Adapter:
    @staticmethod
    def save(folder: Path, value: float) -> None:
        fastlora.save_adapter(model(value), folder)

    @staticmethod
    def load(folder: Path) -> float:
        loaded = fastlora.load_adapter(nn.Sequential(nn.Linear(6, 6)), folder)
        layer = loaded.base_model.model[0]
        weights = layer.lora_B["default"].weight.unique().tolist()
        assert weights == [layer.lora_alpha["default"]], "of two saves, a part each"
        return weights[0]


class Measurements:
    @staticmethod
    def save(folder: Path, value: float) -> None:
        timing = dict.fromkeys(OPS, Timing({"blocks": value}))
        measured.add({Problem(2**i, 16, 16): timing for i in range(1, 20)}, CPU)

    @staticmethod
    def load(folder: Path) -> float:
        found = measured._read(measured.path_of(CPU), None)
        assert found, "not as it was written"
        (value,) = {t.seconds["blocks"] for timings in found.values() for t in timings.values()}
        return value


each_kind = pytest.mark.parametrize("kind", [Adapter, Measurements])
STEPS = ("open", "fsync", "replace")  # calls of ``os`` on a file's way to its name
REFUSED = 3  # the exit code of a forked process for an OSError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_loaded", {})
    return tmp_path


def forked(call) -> int:
    """Run ``call`` in a forked process and return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(60)  # should it hang, or be left alone
        torch.set_num_threads(1)
        call()
        code = 0
    except OSError:
        code = REFUSED
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a forked process and return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_fork
@each_kind
def test_killed_at_every_step_of_saving(kind, folder):
    """A kill before each of these calls in turn: it is the old or the new, until all is done."""
    kind.save(folder, 1.0)

    def save_and_die(at: int) -> None:
        calls = 0

        def dying(real):
            def call(*args, **options):
                nonlocal calls
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return real(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        kind.save(folder, 2.0)

    for at in range(40):
        code = ended(forked(lambda at=at: save_and_die(at)))
        found = kind.load(folder)
        assert found in (1.0, 2.0)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and found == 2.0
    assert at >= 3, "fewer steps than a file takes"


@needs_fork
@each_kind
def test_killed_at_random_a_hundred_times(kind, folder):
    kind.save(folder, 1.0)
    draw, seen = random.Random(0), set()

    def save_for_ever() -> None:
        while True:
            for value in (2.0, 3.0):
                kind.save(folder, value)

    longest = 0.04  # to be forked takes about a quarter of it; a slow disk has it grow
    for i in range(300):
        child = forked(save_for_ever)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        seen.add(kind.load(folder))
        if i >= 99 and len(seen) > 1:
            break
        longest *= 1.01 if len(seen) == 1 else 1.0
    assert seen <= {1.0, 2.0, 3.0} and len(seen) > 1, "no kill came where it matters"


@needs_fork
@each_kind
def test_two_processes_save_while_a_third_reads(kind, folder):
    kind.save(folder, 1.0)

    def save_often(values) -> None:
        while time.monotonic() < until:
            for value in values:
                kind.save(folder, value)

    until = time.monotonic() + 2.0
    children = [forked(lambda v=values: save_often(v)) for values in ((2.0, 3.0), (4.0, 5.0))]
    seen, running, codes = set(), set(children), []
    while running:
        seen.add(kind.load(folder))
        for child in list(running):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                running.discard(child)
                codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [0, 0]
    assert kind.load(folder) in (3.0, 5.0)
    assert len(seen) > 2


@needs_fork
def test_a_file_replaced_while_another_process_replaces_it(tmp_path):
    path = tmp_path / "file"

    def write(file) -> None:
        file.write(b"first half, ")
        assert ended(forked(lambda: replace_file(path, lambda other: other.write(b"whole")))) == 0
        assert path.read_bytes() == b"whole"
        file.write(b"second half")

    replace_file(path, write)
    assert path.read_bytes() == b"first half, second half"
    assert list(tmp_path.iterdir()) == [path]


@needs_fork
@pytest.mark.parametrize("most", [1, 300, 2000])
@each_kind
def test_a_disk_that_is_full(kind, most, folder):
    """Files may not grow past ``most`` bytes: an error, or a warning of the tuner's; the old."""
    resource = pytest.importorskip("resource", reason="the system limits no file's size")
    kind.save(folder, 1.0)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        kind.save(folder, 2.0)

    code = ended(forked(save))
    refused = 0 if kind is Measurements else REFUSED  # the tuner warns
    assert code in ((refused, 0) if most == 2000 else (refused,))
    assert kind.load(folder) in ((1.0, 2.0) if most == 2000 else (1.0,))
    assert not list(folder.glob(".*.tmp"))


# Locks, and what a kill leaves behind


@needs_fork
def test_a_lock_ends_with_its_block_whatever_was_forked_in_it(tmp_path):
    with files.locked(tmp_path):
        child = forked(lambda: time.sleep(30))  # has the handle too
    try:
        start = time.monotonic()
        with files.locked(tmp_path):
            assert time.monotonic() - start < 5
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)


def test_a_lock_is_not_waited_for_without_end(tmp_path, monkeypatch):
    """As where a signal's handler saves while the program loads."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    Adapter.save(tmp_path, 1.0)
    with files.locked(tmp_path, shared=True):
        Adapter.save(tmp_path, 2.0)
        with files.locked(tmp_path, shared=True):  # readers wait for nobody
            assert Adapter.load(tmp_path) == 2.0
    with files.locked(tmp_path / "nowhere"):
        pass


def test_what_kills_have_left_is_removed_when_it_is_old(folder):
    Adapter.save(folder, 1.0)
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    left = [folder / f".{name}.{i}.abcd.tmp" for name in names for i in range(3)]
    for i, path in enumerate(left):
        path.write_bytes(b"half")
        if i % 3:
            os.utime(path, (time.time() - 7200,) * 2)
    Adapter.save(folder, 2.0)
    assert [path for path in left if path.exists()] == left[::3]
    assert Adapter.load(folder) == 2.0


def test_the_newest_of_many_configs_that_were_left_is_found(folder):
    """A kill between the two names, after hundreds of others."""
    Adapter.save(folder, 1.0)
    old = (folder / "adapter_config.json").read_bytes()
    for i in range(200):
        path = folder / f".adapter_config.json.{i}.abcd.tmp"
        path.write_bytes(old)
        os.utime(path, (time.time() - 60,) * 2)
    Adapter.save(folder, 2.0)
    os.rename(folder / "adapter_config.json", folder / ".adapter_config.json.999.abcd.tmp")
    (folder / "adapter_config.json").write_bytes(old)
    assert Adapter.load(folder) == 2.0


# Memory


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mlp = MLP()

    def forward(self, x):
        return self.mlp(self.q(x) + self.k(x) * self.v(x))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*d) for d in ((8, 24), (8, 24), (24, 8)))

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


LINEARS = ["q", "k", "v", "gate", "up", "down"]
LORA = {"r": 2, "init_lora_weights": False}
X = torch.linspace(-1, 1, 40).reshape(5, 8)


def step(block: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    trained = [p for p in block.parameters() if p.requires_grad]
    y = block(X)
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


STAGES = ["_shrink", "expand", "_ds_db", "_add_low_rank"]


@pytest.mark.parametrize(
    ("module", "name", "fused"),
    [
        *itertools.product([blocks], STAGES, [False, True]),
        (gated, "_kernels", True),  # between the two halves of a gated MLP
        (siblings, "_circumstances", True),  # between a group's outputs and their hand-out
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_out_of_memory_in_the_middle(module, name, fused, monkeypatch):
    """The error comes through, and the next step is as if nothing had been."""
    blocks = []
    for _ in range(2):
        block = Block()
        torch.manual_seed(3)
        how = X if fused else False
        report = fastlora.replace_linears(
            block, LINEARS, fuse_siblings=how, lora_dropout=0.3, **LORA
        )
        assert (len(report.siblings), len(report.gated_mlps)) == ((1, 1) if fused else (0, 0))
        blocks.append(block)
    first, other = blocks
    expected = step(other)
    with monkeypatch.context() as patch:
        effects = [torch.OutOfMemoryError("out of memory"), *[mock.DEFAULT] * 100]
        real = getattr(module, name)
        patch.setattr(module, name, mock.Mock(wraps=real, side_effect=effects))
        with pytest.raises(torch.OutOfMemoryError):
            step(first)
        found = step(first)
    assert all(map(torch.equal, found, expected))


# Processes


@needs_fork
def test_a_fork_after_use():
    """As a DataLoader makes its workers, whose torch has one thread."""
    block = Block()
    fastlora.replace_linears(block, LINEARS, fuse_siblings=[("q", "k", "v")], **LORA)
    expected = step(block)

    def again() -> None:  # one thread may add in another order than two
        torch.testing.assert_close(step(block), expected)

    assert ended(forked(again)) == 0


def _step_in_a_new_process(block, queue) -> None:
    queue.put([t.tolist() for t in step(block)])


def test_a_new_process():
    """Spawned: the block comes as a pickle."""
    block = Block()
    fastlora.replace_linears(block, ["q", "v"], fuse_siblings=[("q", "k", "v")], **LORA)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_step_in_a_new_process, args=(block, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    for one, other in zip(found, step(block), strict=True):
        torch.testing.assert_close(torch.tensor(one), other.detach())


def test_what_a_read_only_folder_gets(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is put in its place."""
    kept = tmp_path / "kept"
    fastlora.save_adapter(model(1.0), kept)

    real = builtins.open

    def guarded(path, mode="r", *args, **options):
        if "w" in mode or "x" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    with pytest.raises(PermissionError, match="Permission denied"):
        fastlora.save_adapter(model(2.0), kept)
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_loaded", {})
    with pytest.warns(UserWarning, match="cannot be kept in .*Permission denied"):
        Measurements.save(tmp_path, 1.0)
    assert Adapter.load(kept) == 1.0
    assert json.loads((kept / "adapter_config.json").read_text())["lora_alpha"] == 1.0
