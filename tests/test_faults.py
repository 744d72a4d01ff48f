# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around the package: killed processes, full disks, too little memory, forks.

Each fault leaves files that are old or new and whole, and a process whose next call is right.
"""

import copy
import functools
import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastlora
from fastlora import files
from fastlora.files import replace_file
from fastlora.layers import gated, siblings
from fastlora.operator import blocks, measured
from fastlora.operator.operands import Problem

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
    refused = 3  # the exit code of a forked process for an OSError

    @staticmethod
    def save(folder: Path, value: float) -> None:
        fastlora.save_adapter(model(value), folder)

    @staticmethod
    def load(folder: Path) -> float:
        layer = fastlora.load_adapter(nn.Sequential(nn.Linear(6, 6)), folder).base_model.model[0]
        (value,) = layer.lora_B["default"].weight.unique().tolist()
        assert value == layer.lora_alpha["default"], "of two saves, a part each"
        return value


class Measurements:
    refused = 0  # it warns

    @staticmethod
    def save(folder: Path, value: float) -> None:
        row = {"forward": {"blocks": value}, "backward": {"blocks": value}, "configs": {}}
        measured.add({Problem(2**i, 16, 16): row for i in range(1, 20)}, CPU)

    @staticmethod
    def load(folder: Path) -> float:
        found = measured._read(measured.path_of(CPU))  # raises where it is not as it was written
        (value,) = {row[op]["blocks"] for row in found.values() for op in ("forward", "backward")}
        return value


each_kind = pytest.mark.parametrize("kind", [Adapter, Measurements])


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
        code = Adapter.refused
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
        steps = itertools.count()

        def dying(real, *args, **options):
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        for name in ("open", "fsync", "replace"):  # on a file's way to its name
            setattr(os, name, functools.partial(dying, getattr(os, name)))
        kind.save(folder, 2.0)

    found = []
    for at in itertools.count():
        code = ended(forked(lambda at=at: save_and_die(at)))
        found.append(kind.load(folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert set(found) <= {1.0, 2.0} and found[-1] == 2.0
    assert len(found) > 3, "fewer steps than a file takes"


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
    seen = set()
    while time.monotonic() < until:
        seen.add(kind.load(folder))
    assert [ended(child) for child in children] == [0, 0]
    last = kind.load(folder)
    assert last in (3.0, 5.0) and len(seen | {last}) > 2


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
@pytest.mark.parametrize("most", [1, 300])
@each_kind
def test_a_disk_that_is_full(kind, most, folder):
    """Files may not grow past ``most`` bytes: an error, or a warning of the tuner's; the old."""
    resource = pytest.importorskip("resource", reason="the system limits no file's size")
    kind.save(folder, 1.0)

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        kind.save(folder, 2.0)

    assert ended(forked(save)) == kind.refused
    assert kind.load(folder) == 1.0
    assert not list(folder.glob(".*.tmp"))


@needs_fork
def test_locks_end_with_their_block_and_are_not_waited_for_without_end(tmp_path, monkeypatch):
    Adapter.save(tmp_path, 1.0)
    with files.locked(tmp_path):
        child = forked(lambda: time.sleep(30))  # has the handle too
    start = time.monotonic()
    with files.locked(tmp_path):
        assert time.monotonic() - start < 5
    os.kill(child, signal.SIGKILL)
    ended(child)
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with files.locked(tmp_path, shared=True):  # as where a signal's handler saves meanwhile
        Adapter.save(tmp_path, 2.0)
        with files.locked(tmp_path, shared=True):  # readers wait for nobody
            assert Adapter.load(tmp_path) == 2.0
    with files.locked(tmp_path / "nowhere"):
        pass


def test_what_kills_have_left_is_removed_when_it_is_old_and_else_harmless(folder):
    Adapter.save(folder, 1.0)
    config = folder / "adapter_config.json"
    old = config.read_bytes()
    left = [folder / f".{config.name}.{i}.abcd.tmp" for i in range(300)]
    for i, path in enumerate(left):
        path.write_bytes(old)
        os.utime(path, (time.time() - (7200 if i % 3 else 60),) * 2)
    Adapter.save(folder, 2.0)
    assert [path for path in left if path.exists()] == left[::3]
    os.rename(config, folder / f".{config.name}.999.abcd.tmp")  # killed between the two names
    config.write_bytes(old)
    assert Adapter.load(folder) == 2.0


LINEARS = ["q", "k", "v", "gate", "up", "down"]
X = torch.linspace(-1, 1, 40).reshape(5, 8)


def step(block: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    trained = [p for p in block.parameters() if p.requires_grad]
    y = block(X)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]


def adapted(names=LINEARS, how=False, p=0.0) -> tuple[nn.Module, fastlora.PatchReport]:
    block, same = tiny.Block(), {"r": 2, "init_lora_weights": False, "lora_dropout": p}
    return block, fastlora.replace_linears(block, names, fuse_siblings=how, **same)


STAGES = ["shrink_rows", "product", "scaled_product", "add_low_rank"]


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
    block, report = adapted(how=X if fused else False, p=0.3)
    assert (len(report.siblings), len(report.gated_mlps)) == ((1, 1) if fused else (0, 0))
    expected = step(copy.deepcopy(block))
    with monkeypatch.context() as patch:
        effects = [torch.OutOfMemoryError("out of memory"), *[mock.DEFAULT] * 100]
        real = getattr(module, name)
        patch.setattr(module, name, mock.Mock(wraps=real, side_effect=effects))
        with pytest.raises(torch.OutOfMemoryError):
            step(block)
        found = step(block)
    assert all(map(torch.equal, found, expected))


@needs_fork
def test_a_fork_after_use():
    """As a DataLoader makes its workers, whose torch has one thread."""
    block, _ = adapted(how=[("q", "k", "v")])
    expected = step(block)
    # One thread may add in another order than two.
    assert ended(forked(lambda: torch.testing.assert_close(step(block), expected))) == 0


def test_a_new_process():
    """Spawned: the block comes as a pickle."""
    block, _ = adapted(["q", "v"], how=[("q", "k", "v")])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(step, [block]).get(timeout=120)
    torch.testing.assert_close(found, step(block))
