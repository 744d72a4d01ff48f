# SPDX-License-Identifier: Apache-2.0
"""What a long run shows and a test does not: memory that grows, losses that drift.

python tests/tools/long_run.py [--steps 2000] [--cycles 10000]    # make long: some minutes on a CPU
"""

import argparse
import gc
import statistics
import sys

import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model

import fastlora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOST_GROWTH = 4 << 20  # bytes of resident memory from a quarter of the way to its end
MOST_DRIFT = 2e-3  # of a loss, relative, float32 sums in another order


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def growth(run, count: int) -> int:
    """Run ``run(i)`` ``count`` times; return by how much memory grows after the first quarter."""
    early = 0
    for i in range(count):
        if i == count // 4:
            early = resident()
        run(i)
    return resident() - early


def model(fused: bool, device: str = "cpu") -> torch.nn.Module:
    torch.manual_seed(0)
    made = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=TARGETS)).train()
    made = made.to(device)
    if fused:
        inputs = {"input_ids": tiny.tokens().to(device)}
        report = fastlora.patch_peft(made, fuse_siblings=inputs)
        assert report.fused and report.siblings and not report.not_fused, report
    return made


def losses(fused: bool, steps: int, device: str = "cpu") -> tuple[list[float], int]:
    """Train on random sentences that repeat; return each loss, and by how much memory grows."""
    made, found = model(fused, device), []
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, tiny.VOCABULARY, (64, 12), generator=generator).to(device)

    def step(i: int) -> None:
        ids = data[[(4 * i + j) % 64 for j in range(4)]]
        loss = made(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())

    return found, growth(step, steps)


def cycles() -> dict:
    """Return what is repeated, by name."""
    made, linear = model(False), torch.nn.Linear(16, 16)
    fastlora.patch_peft(made)
    ids, x = tiny.tokens(), torch.ones(2, 16)

    def patch(i: int) -> None:
        fastlora.patch_peft(made, fuse_siblings=[("q_proj", "k_proj", "v_proj")])
        fastlora.unpatch_peft(made)

    def switch(i: int) -> None:
        made.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        made.set_adapter("other")
        if i % 100 == 0:
            made(ids, labels=ids).loss.backward()
        made.set_adapter("default")
        made.delete_adapter("other")

    def layers(i: int) -> None:
        layer = fastlora.LoRALinear.from_linear(linear, r=2)
        layer.merge()
        layer(x)
        layer.unmerge()
        layer(x).sum().backward()

    return {"patch, unpatch": patch, "add, switch, delete": switch, "make, merge": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cycles", type=int, default=10_000)
    options = parser.parse_args()
    (plain, _), (fused, grown), (again, _) = (
        losses(fused, options.steps) for fused in (False, True, True)
    )
    early = max(abs(a - b) / b for a, b in zip(fused[:200], plain[:200], strict=True))
    late = [statistics.mean(of[-200:]) for of in (fused, plain)]
    right = {
        "the same seed gives the same losses, bit for bit": fused == again,
        f"the first 200 losses are PEFT's to {early:.1e}": early < MOST_DRIFT,
        f"the last 200 are {late[0]:.4f} on average, PEFT's {late[1]:.4f}": (
            abs(late[0] - late[1]) / late[1] < 10 * MOST_DRIFT
        ),
    }
    growths = {f"{options.steps} steps": grown}
    for name, run in cycles().items():
        growths[f"{options.cycles} times {name}"] = growth(run, options.cycles)
    for what, grown in growths.items():
        right[f"{what}: memory grows by {grown >> 10} KiB"] = grown < MOST_GROWTH
    for what, ok in right.items():
        print(f"{'ok   ' if ok else 'WRONG'} {what}")
    sys.exit(not all(right.values()))


if __name__ == "__main__":
    main()
