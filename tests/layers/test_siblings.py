# SPDX-License-Identifier: Apache-2.0
"""Siblings run as one operator, in their groups and in copies of them."""

import copy
import gc
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from measure import kept_bytes
from peft_models import add, same_kinds
from sibling_models import COPIES, QKV, X, added, close, nothing_held, pair, results, wrapped
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import patch_peft, unpatch_peft
from fastlora.layers.siblings import FrozenLinear
from fastlora.peft.linear import FusedLinear

pytestmark = pytest.mark.usefixtures("no_leftovers")


CASES = [("qkvo", 0.4), ("qv", 0.0), ("k", 0.4), ("vo", 0.0)]


@pytest.mark.parametrize(("targets", "p"), CASES)
def test_the_same_outputs_gradients_and_dropout(targets, p, together):
    plain, fused = pair(targets=targets, lora_dropout=p)
    close(results(fused), results(plain))
    assert together == [3] and nothing_held()


def test_one_node_of_the_graph_that_keeps_x_and_the_small_s(together):
    """Autograd adds up no gradients of x; of the wide tensors x alone is kept, and once."""
    _, block = pair(targets=QKV)
    block.between, x = lambda x: None, X.clone().requires_grad_()
    assert kept_bytes(block, x) == 4 * (3 * 6 + 3 * 3 * 3)
    ys = [getattr(block, name)(x) for name in QKV]
    assert len({y.grad_fn for y in ys}) == 1 and together == [3, 3]
    _, block = pair(targets=["q"])  # with x and k frozen nothing that follows k is to be kept
    assert [getattr(block, name)(X).requires_grad for name in QKV] == [True, False, False]


def test_under_peft_and_taken_back(together):
    """A frozen sibling that gets an adapter keeps its place; several of one layer take part."""
    plain, patched = wrapped(), wrapped()
    keys = list(patched.state_dict())
    patch_peft(patched, fuse_siblings={"x": X})
    k = patched.base_model.model.k
    assert list(patched.state_dict()) == keys and type(k) is FrozenLinear
    with patched.disable_adapter(), plain.disable_adapter():
        close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.merge_adapter()
    close([patched(X)], [plain(X)])
    for model in (plain, patched):
        model.unmerge_adapter()
    assert together == []
    close(results(patched), results(plain))
    assert together == [3]
    copied = copy.deepcopy(patched)
    unpatch_peft(copied)
    same_kinds(copied, plain)
    for model in (plain, patched):
        add(model, r=2, target_modules=["k", "q"])
        model.base_model.set_adapter(["default", "other"])
    close(results(patched), results(plain))
    k = patched.base_model.model.k
    assert together == [3, 3] and type(k) is FusedLinear and type(k.base_layer) is nn.Linear


def test_the_latest_patch_says_what_is_together(together):
    """In copies as in the original."""
    model = wrapped()
    for names in (("q", "k"), ("v", "o")):
        patch_peft(model, fuse_siblings=[names])
    for each in (model, copy.deepcopy(model)):
        each(X)
    assert together == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout(reentrant, together):
    """The same elements are dropped when forward runs again, also by o; nothing is left over."""
    _, block = pair(targets="qvo", lora_dropout=0.4)

    def grads(function):
        torch.manual_seed(2)
        x = X.clone().requires_grad_()
        y = function(x)
        return [y, *added(block, y.square().sum()), x.grad]

    expected = grads(block)
    close(grads(lambda x: checkpoint(block, x, use_reentrant=reentrant)), expected)
    assert together == [3] * 3 and nothing_held()


def test_the_first_of_a_group_begins_anew(together):
    """Two forwards with one x: the second one's outputs are of its own graph."""
    found = []
    for block in pair():
        q = block.q(X)
        both = q.square().sum(), sum(getattr(block, name)(X).square().sum() for name in QKV)
        found.append([grad for loss in both for grad in added(block, loss)])
    close(*reversed(found))
    assert together == [3, 3]


def test_many_threads(together):
    plain, fused = pair()
    inputs = [X + i for i in range(8)]
    expected = [plain(x) for x in inputs]
    rounds = threading.Barrier(8, timeout=60)
    fused.between = lambda x: rounds.wait()  # until every thread holds outputs of its own

    def work(x, y):
        for _ in range(20):
            close([fused(x)], [y])
            assert nothing_held()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, inputs, expected))
    assert together == [3] * 160


def calls(block, times):
    """Return what is said meanwhile."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(times):
            block(X)
    return [str(each.message) for each in said if each.category is UserWarning]


def test_a_group_that_misses_is_given_up_and_says_so_once(together):
    """Not one that seldom does."""
    plain, fused = pair()
    for _ in range(5):
        fused.used = ("q", "k")
        fused(X)
        fused.used = QKV
        assert calls(fused, 9) == []
    assert together == [3] * 50
    fused.used = ("q", "k")
    assert calls(fused, 3) == []
    (said,) = calls(fused, 5)
    assert said.startswith("v: computed beside 'q' and not called with its input, 3 times")
    assert "q, k, v run alone from now on" in said and "fuse_siblings=[('q', 'k')] leaves" in said
    assert fused.q._siblings is None and nothing_held()
    fused.used = QKV
    close(results(fused), results(plain))
    assert together == [3] * 53
    _, block = pair(targets=["q"])
    block.used = ("q",)
    (said,) = calls(block, 4)  # no two of them are left to be named
    assert said.startswith("k, v: computed beside 'q'") and "fuse_siblings" not in said


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_group_that_misses_in_checkpoints_goes_on(reentrant):
    """Run again for backward it has to draw what it drew, and keep what it kept."""
    _, block = pair(lora_dropout=0.4)
    block.used = ("q", "k")
    always = copy.deepcopy(block)
    always.q._siblings.misses = -(1 << 30)
    with pytest.warns(UserWarning, match="^v: computed beside 'q'") as said:
        for seed in range(4):
            found = []
            for each in (block, always):
                torch.manual_seed(seed)
                x = y = X.clone().requires_grad_()
                for _ in range(3):  # the same block, as some models have it
                    y = checkpoint(each, y, use_reentrant=reentrant) if each is block else each(y)
                found.append([*added(each, y.square().sum()), x.grad])
            close(*found)
    assert len(said) == 1 and block.q._siblings is not None
    assert calls(block, 5) == [] and block.q._siblings is None


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies_are_siblings_of_their_own(how, together):
    """But not of a layer alone, nor of what shares the groups of a module that has gone since."""
    plain, block = pair()
    copied, alone, shallow, gone = how(block), how(block.q), copy.copy(block), weakref.ref(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.neg_()
    close(results(copied), results(plain))
    close([alone(X)], [plain.q(X)])
    assert together == [3] and alone._siblings.members() is None
    assert len(pickle.dumps(alone)) < 1.1 * len(pickle.dumps(plain.q))
    del block
    gc.collect()
    assert gone() is None
    copied = how(how(shallow))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.neg_()
    close(results(copied), results(plain))
    assert together == [3] and copied.q._siblings.members() is None


def test_replicas_compute_with_their_own_parameters(together):
    """As nn.DataParallel makes them: its copies of k and v are not in the group."""
    plain, fused = pair(targets=["o"])
    fused = copy.deepcopy(fused)
    replica, expected = fused._replicate_for_data_parallel(), plain(X)
    for name in (*QKV, "o"):
        setattr(replica, name, getattr(fused, name)._replicate_for_data_parallel())
    for name in QKV:
        for parameter, value in getattr(plain, name).named_parameters():
            setattr(getattr(replica, name), parameter, value)
            nn.init.zeros_(getattr(getattr(fused, name), parameter))
    close([replica(X)], [expected])
    assert together == []
