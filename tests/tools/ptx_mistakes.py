# SPDX-License-Identifier: Apache-2.0
"""Programs broken on purpose, one instruction each, and what the executor says of them.

`make executed ARGS="--broken 2"`, Triton 3.7.1: places broken, those noticed as a fault or by the
acceptance rule, and those that are harmless there: in step and in four runs out of step, each time
half of the warps ahead of the others, no bit of what the launch writes is another one. None was
missed: noticed by no check, and yet other bits.

    barrier removed            64   48  16    async fence removed        23   16   7
    barrier of a warp removed   8    8   0    tensormap fence removed     8    8   0
    shared store shifted       60   56   4    bytes too few               8    8   0
    global store shifted       72   72   0    bytes too many              8    8   0
    global load shifted        62   62   0    parity flipped              4    4   0
    stmatrix shifted           10   10   0    mbarrier not waited for     4    4   0
    ldmatrix shifted           33   33   0    bulk copy turned            7    7   0
    global load unmasked       33   21  12    bulk store wait removed     8    3   5
    global store unmasked      66   61   5    bulk store wait later       8    2   6
    cp.async wait later        52   29  23    wgmma fence removed        24   24   0
    cp.async wait removed      52   45   7    wgmma wait removed         28   21   7
    cp.async group not closed  52   43   9    wgmma wait later           28   20   8
    cp.async shifted           52   52   0    wgmma group not closed     24   17   7
    cp.async unmasked          31   15  16    wgmma descriptor shifted   24   24   0

853 places, 721 noticed. Harmless are a barrier beside another one, a wait after the last step or
before one that waits for more, and masks under which the bytes beyond are there and not used.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator

from executed import Case, printed
from fastlora_kernels.configs import Config
from ptx.memory import FaultError
from ptx.program import Program
from ptx.running import Executor


def _more(found: re.Match) -> str:
    """Return what was found with its number one larger."""
    return found[1] + str(int(found[2]) + 1)


# Kind of mistake: what to look for in the PTX, and what to put in its place.
BREAKS = {
    "barrier removed": (r"\bbar\.sync\s+0;", ""),
    "barrier of a warp removed": (r"\bbar\.warp\.sync\s+-1;", ""),
    "shared store shifted": (r"(\bst\.shared[^\[]*\[[^\]]*?\+ )0( \])", r"\g<1>16\2"),
    "global store shifted": (r"(\bst\.global[^\[]*\[[^\]]*?\+ )0( \])", r"\g<1>16\2"),
    "global load shifted": (r"(\bld\.global[^\[]*\[[^\]]*?\+ )0( \])", r"\g<1>16\2"),
    "stmatrix shifted": (r"(\bstmatrix[^\[]*\[%\w+)(?:\+\d+)?(\])", r"\1+128\2"),
    "ldmatrix shifted": (r"(\bldmatrix[^\[]*\[%\w+)(?:\+\d+)?(\];)", r"\1+4096\2"),
    "global load unmasked": (r"@%p\d+ (ld\.global)", r"\1"),
    "global store unmasked": (r"@%p\d+ (st\.global)", r"\1"),
    "cp.async wait later": (r"(\bcp\.async\.wait_group\s+)(\d+)", _more),
    "cp.async wait removed": (r"\bcp\.async\.wait_group\s+\d+;", ""),
    "cp.async group not closed": (r"\bcp\.async\.commit_group;", ""),
    "cp.async shifted": (r"(\bcp\.async\.c[ag]\.shared\.global \[ %\w+ \+ )0", r"\g<1>16"),
    "cp.async unmasked": (r"(\bcp\.async\.c[ag][^;]*), %r\d+;", r"\1;"),
    "bytes too few": (r"(\bexpect_tx[^;]*, )(\d+);", r"\g<1>128;"),
    "bytes too many": (r"(\bexpect_tx[^;]*, \d+);", r"\g<1>0;"),
    "parity flipped": (r"(mbarrier\.try_wait[^;]*\], )(%r\d+);", r"xor.b32 %odd, \2, 1; \1%odd;"),
    "mbarrier not waited for": (r"mbarrier\.try_wait\S* (\w+),[^;]*;", r"mov.pred \1, -1;"),
    "async fence removed": (r"\bfence\.proxy\.async\S*;", ""),
    "tensormap fence removed": (r"@%p\d+ fence\.proxy\.tensormap[^;]*;", ""),
    "bulk copy turned": (r"(\bcp\.async\.bulk\.tensor[^;]*\{)(%r\d+), (%r\d+)", r"\1\3, \2"),
    "bulk store wait removed": (r"(?:@%p\d+ )?cp\.async\.bulk\.wait_group\.read\s+\d+\s*;", ""),
    "bulk store wait later": (r"(\bcp\.async\.bulk\.wait_group\.read\s+)(\d+)", _more),
    "wgmma fence removed": (r"\bwgmma\.fence\.sync\.aligned;", ""),
    "wgmma wait removed": (r"\bwgmma\.wait_group\.sync\.aligned \d+;", ""),
    "wgmma wait later": (r"(\bwgmma\.wait_group\.sync\.aligned )(\d+)", _more),
    "wgmma group not closed": (r"\bwgmma\.commit_group\.sync\.aligned;", ""),
    "wgmma descriptor shifted": (r"(\b(?:or|add)\.[bs]64\s+%rd\d+, %rd\d+, )(46\d{17})", _more),
}
CASES = (
    Case(80, "bf16", "even", 64, 0.1, 1),
    Case(80, "bf16-fp32", "ragged", 16, 0.0, 3),
    Case(80, "fp32", "even", 64, 0.0, 1),
    Case(90, "bf16", "even", 64, 0.0, 1),
    Case(90, "bf16-fp32", "even", 32, 0.1, 1),
    Case(90, "fp16", "uneven", 64, 0.1, 3),
)


# In the test suite: places by their number, in a program of which they are run.
SAMPLE = {
    (90, "persistent_outputs_kernel"): (
        *(("barrier removed", 20), ("bytes too few", 0), ("bytes too many", 0)),
        *(("parity flipped", 0), ("mbarrier not waited for", 0), ("async fence removed", 1)),
        *(("tensormap fence removed", 0), ("bulk store wait removed", 5), ("bulk copy turned", 2)),
        *(("stmatrix shifted", 0), ("wgmma fence removed", 0), ("wgmma wait removed", 0)),
        *(("wgmma wait later", 1), ("wgmma group not closed", 0), ("wgmma descriptor shifted", 0)),
        ("barrier of a warp removed", 0),
    ),
    (80, "outputs_kernel"): (
        *(("cp.async wait removed", 0), ("cp.async shifted", 0), ("ldmatrix shifted", 0)),
        *(("global store shifted", 0), ("shared store shifted", 0)),
    ),
}


def broken(ptx: str, what: str) -> list[tuple[str, str]]:
    """Return, for each place, the program broken there, and one with a mistake of another kind.

    That one is always noticed if the program comes by there, under a mask that is not full.
    """
    pattern, text = BREAKS[what]
    made = []
    for found in re.finditer(pattern, ptx):
        wrong = text(found) if callable(text) else found.expand(text)
        wrong = ptx[: found.start()] + wrong + ptx[found.end() :]
        probe = "mov.b32 %probe, %never;\n"
        line = ptx.rfind("\n", 0, found.start()) + 1
        guard = re.match(r"\s*@(%p\d+)", ptx[line : found.end()])
        if "unmasked" in what and guard:
            probe = f"@!{guard[1]} {probe}"
        elif "unmasked" in what:
            bytes_read = re.search(r"%r\d+(?=;)", found[0])[0]
            probe = f"setp.eq.s32 %none, {bytes_read}, 0; @%none {probe}"
        elif guard:
            probe = f"@{guard[1]} {probe}"
        if wrong != ptx:
            made.append((wrong, ptx[:line] + probe + ptx[line:]))
    return made


class Keeping(Executor):
    """Keeps, for each program, its first launch, and memory before and after it."""

    def __init__(self, *of, **options):
        super().__init__(*of, **options)
        self.kept: dict[str, list] = {}

    def __call__(self, call) -> None:
        kept = self.kept.setdefault(self.compiled_for(call)[0].asm["ptx"], [])
        if not kept:
            self.have(call)
            kept += [call, self._state()]
        super().__call__(call)
        if len(kept) == 2:
            kept.append(self._state())

    def _state(self) -> list[tuple]:
        every = self.memory.allocations
        return [(each, each.bytes.copy(), each.written.copy()) for each in every]

    def noticed(self, right: str, wrong: str, skew: random.Random | None = None) -> str:
        """Return the fault of a program that is wrong, "other bits", or nothing."""
        call, before, after = self.kept[right]
        for each, content, written in before:
            each.bytes[:], each.written[:] = content, written
        again = Executor(self.target.arch, lambda ptx: wrong if ptx == right else ptx, skew)
        again.memory = self.memory
        try:
            again(call)
        except Exception as error:
            return getattr(error, "kind", type(error).__name__)
        if again.overwriting - self.overwriting:
            return "overwriting"
        same = all((each.bytes == content).all() for each, content, _ in after)
        return "" if same else "other bits"


def noticed(case: Case, right: str, wrong: str, kept: Keeping) -> str:
    """Return what says that a program of a case is wrong: a fault, the acceptance rule, nothing."""
    found = kept.noticed(right, wrong)
    if found != "other bits":
        return found
    try:
        case.run(edit=lambda ptx: wrong if ptx == right else ptx)
    except AssertionError:
        return "result"
    except Exception as error:
        return getattr(error, "kind", type(error).__name__)
    return ""


def sample() -> Iterator[dict]:
    """Yield what is noticed of each kind of mistake, once, and of a race that was Triton's own.

    It gave tiles that wgmma reads one buffer fewer than copies were under way; `is_valid` refuses
    that config on sm_90.
    """
    for (capability, kernel), places in SAMPLE.items():
        case = Case(capability, "bf16", "even", 16, 0.0, 1)
        kept = case.run(kind=Keeping)
        ptx = next(ptx for ptx in kept.kept if Program(ptx).name == kernel)
        yield {
            "what": f"nothing, out of step: {kernel}",
            "found": kept.noticed(ptx, ptx + "\n", random.Random(0)),
        }
        for what, place in places:
            wrong, _ = broken(ptx, what)[place]
            yield {"what": what, "found": noticed(case, ptx, wrong, kept)}
    try:
        Case(90, "bf16", "even", 16, 0.0, 1).run({"ds_db": Config(32, 128, num_warps=8)})
    except FaultError as fault:
        yield {"what": "a ring that is too short", "found": fault.kind}


def main(most: int) -> None:
    """Break up to ``most`` places of each kind in each program, and print what was noticed."""
    count: dict[str, Counter] = {what: Counter() for what in BREAKS}
    for case in CASES:
        kept = case.run(kind=Keeping)
        for i, (ptx, what) in enumerate(itertools.product(list(kept.kept), BREAKS)):
            places, draw = broken(ptx, what), random.Random(i)
            for wrong, probe in draw.sample(places, min(most, len(places))):
                found = noticed(case, ptx, wrong, kept)
                if not found and not kept.noticed(ptx, probe):
                    continue  # it never runs
                if not found:
                    later = [kept.noticed(ptx, wrong, random.Random(seed)) for seed in range(4)]
                    found = f"MISSED: {max(later)}" if any(later) else "harmless"
                    print(f"{what}, {found}: {case} {_place(ptx, wrong)}", flush=True)
                count[what][found] += 1
    for what, found in count.items():
        print(f"{what:28}", ", ".join(f"{n} {kind}" for kind, n in found.most_common()), flush=True)


def _place(ptx: str, wrong: str) -> str:
    lines = zip(ptx.splitlines(), wrong.splitlines(), strict=False)
    number, line = next((i, a) for i, (a, b) in enumerate(lines, 1) if a != b)
    return f"{Program(ptx).name} {number}: {line.strip()}"


if __name__ == "__main__":
    printed(sample())
