# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmarks says: Markdown tables, and `pictures`, beside its JSON file.

python benchmarks/report.py benchmarks/results/*.json
"""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from pictures import COLOURS, draw
from problems import block, short, title

from fastlora.files import replace_file

PHASES = ("forward", "backward", "both")
TIMES = ("forward", "ratio", "backward", "ratio", "both", "ratio")
COLUMNS = (*TIMES, "of peak", "of copy", "kept", "peak")
DECODER_COLUMNS = ("kept", "peak", "launches")
MIXED_COLUMNS = (*TIMES, "by PEFT's", "peak")
EXPERTS_COLUMNS = (*TIMES, "by PEFT's", "kept", "ratio", "peak", "ratio")
MODEL_COLUMNS = ("tokens", "s a step", "by PEFT's", "tokens/s", "peak MiB", "GFLOP a token")
MOST_OF_ERROR = 120  # characters in a table; the JSON file has the whole line


def write(path: Path, pictures: bool = True) -> None:
    """Write PATH.md, and unless ``pictures`` is false the plots, from the JSON file ``path``."""
    result = json.loads(path.read_text())
    table = markdown(result).encode()
    replace_file(path.with_suffix(".md"), lambda file: file.write(table))
    if pictures:
        draw(result, path)


def markdown(result: dict) -> str:
    """Return the tables: a section for each problem, and one for all of each other kind.

    A run that was interrupted lacks what it did not come to.
    """
    machine = result["machine"]
    lines = [f"# {machine['device']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in machine.items() if k != "device") + ".", ""]
    for dtype, c in result["ceilings"].items():
        found = c.get("error") or (
            f"{c['copy_bytes_s'] / 1e9:.1f} GB/s copied, "
            f"{c['matrix_flops_s'] / 1e12:.2f} TFLOP/s multiplied."
        )
        lines.append(f"Measured ceilings, {short(dtype)}: {found}")
    lines += [
        "",
        "Times are medians in milliseconds; ratios are medians, over rounds in which all ways took "
        "turns, of a way's time to the frozen layer's (its backward makes dx alone). *kept*: bytes "
        "from forward to backward, for each element of x. *peak*: what one step allocates, MiB. "
        "*of peak*, *of copy*: of the measured matrix rate and copy bandwidth, both directions "
        "together, if every wide tensor moved once.",
    ]
    rows = [row for problem in result.get("problems", ()) for row in problem["rows"]]
    modelled = any(row.get("predicted_s") for row in rows)
    if modelled:
        lines[-1] += (
            " *predicted*: milliseconds of both directions by the model of the GPU, and how "
            "far the measurement is from them."
        )
    if any(map(_with_host, rows)):
        lines[-1] += (
            " *with host*: milliseconds, and the ratio, of steps that begin on an idle GPU, so "
            "that the time Python takes to issue them counts; elsewhere the GPU has them queued."
        )
    for problem in result.get("problems", ()):
        lines += ["", f"## {title(problem)}", "", *layers(problem, result, modelled)]
    if result.get("decoder_layers"):
        lines += decoders(result["decoder_layers"])
    if result.get("end_to_end"):
        lines += models(result["end_to_end"], "cuda" in machine)
    if result.get("mixed_layers"):
        lines += mixed_layers(result["mixed_layers"])
    if result.get("mixed_models"):
        lines += mixed_models(result["mixed_models"])
    if result.get("experts"):
        lines += experts(result["experts"])
    if result.get("dora_layers"):
        lines += dora_layers(result["dora_layers"])
    missing = sorted(set(COLOURS) - {row["way"] for row in rows})
    if missing and result.get("problems"):
        lines += ["", f"Not measured on this machine: {', '.join(missing)}."]
    if result.get("left_out"):
        lines += ["", f"Left out, as the time was over: {'; '.join(result['left_out'])}."]
    return "\n".join(lines) + "\n"


def layers(problem: dict, result: dict, modelled: bool) -> list[str]:
    """Return the table of one layer; ``modelled`` says whether it has predictions."""
    if "error" in problem:
        return [_error(problem)]
    hosts = any(map(_with_host, problem["rows"]))
    columns = (*COLUMNS, *(f"{phase} with host" for phase in PHASES if hosts))
    lines = _head((*columns, "predicted") if modelled else columns)
    for row in problem["rows"]:
        cells = _times(row, 2)
        cells += _rates(row, result["ceilings"][problem["dtype"]])
        elements = problem["M"] * problem["K"]
        cells.append(_cell(row, "kept_bytes", lambda size, of=elements: f"{size / of:.2f}"))
        cells.append(_mib(row, "peak_bytes"))
        if hosts:
            cells += [_cell(row, phase, _host_cell) for phase in PHASES]
        if modelled:
            cells.append(_predicted(row))
        lines.append(_line(row["way"], cells, row))
    return lines


def decoders(problems: list[dict]) -> list[str]:
    """Return the lines about whole decoder layers."""
    lines = ["", "## The linear layers and the MLP of a decoder layer", ""]
    lines += [
        "q, k, v, o and a gated MLP without attention; bf16, r = 16 on all seven. *kept*: MiB from "
        "forward to backward. *launches*: kernels on a GPU, library calls on a CPU."
    ]
    for problem in problems:
        name = f"{problem['name']}, {problem['tokens']} tokens, dropout {problem['p']:g}"
        lines += ["", f"### {name}", ""]
        lines += [_error(problem)] if "error" in problem else _head((*TIMES, *DECODER_COLUMNS))
        for row in problem["rows"]:
            cells = _times(row, 1)
            cells += [_mib(row, key) for key in ("kept_bytes", "peak_bytes")]
            lines.append(_line(row["way"], [*cells, _cell(row, "launches", str)], row))
    return lines


def models(rows: list[dict], on_gpu: bool) -> list[str]:
    """Return the lines about training steps of whole models."""
    lines = ["", "## A training step of a whole model", ""]
    lines += ["Random weights, bf16, r = 16 on every linear, dropout 0.05."]
    if on_gpu:
        lines[-1] += " Steps begin on an idle GPU: the time that Python takes to issue them counts."
    return [*lines, "", *_steps(rows, "batch")]


def _steps(rows: list[dict], by: str) -> list[str]:
    """Return a table of steps of models, which differ in what ``by`` names."""
    lines = _head(MODEL_COLUMNS, f" model | {by} | ", "---|---:|---")
    for row in rows:
        cells = [
            _cell(row, "tokens", str),
            _cell(row, "step_s", lambda seconds: f"{seconds:.3f}"),
            _cell(row, "ratio_to_peft", _ratio),
            _cell(row, "tokens_s", lambda rate: f"{rate:.0f}"),
            _mib(row, "peak_bytes", 0),
            _cell(row, "flops_per_token", lambda flops: f"{flops / 1e9:.3f}"),
        ]
        names = f"{row['model']} | {row[by]} | {row.get('way', '')}"
        lines.append(_line(names, cells, row))
    return lines


def mixed_layers(problems: list[dict]) -> list[str]:
    """Return the lines about layers whose samples have adapters of their own."""
    lines = ["", "## Adapters mixed in one batch", ""]
    lines += [
        "A layer on 64 samples, as many for each adapter, next to each other or by turns; no "
        "dropout. *PEFT* is its layer given `adapter_names`, which its models refuse in training. "
        "On 64 tokens, one of each sample, forward alone without gradients."
    ]
    names = " layer | adapters | order | "
    lines += ["", *_head(MIXED_COLUMNS, names, "---|---:|---|---")]
    for problem in problems:
        order = "by turns" if problem["by_turns"] else ""
        about = f"{title(problem).partition(': ')[2]} | {problem['adapters']} | {order}"
        cells = [
            [*_times(row, 2), _cell(row, "ratio_to_peft", _ratio), _mib(row, "peak_bytes")]
            for row in problem["rows"]
        ]
        lines += _of_ways(problem, about, cells, MIXED_COLUMNS)
    return lines


def mixed_models(rows: list[dict]) -> list[str]:
    """Return the lines about training steps for several adapters."""
    lines = ["", "## A training step for several adapters", ""]
    lines += [
        "As above, a batch of 8 with as many rows for each adapter: together in one batch, or one "
        "adapter after another on its own rows. *by PEFT's*: by PEFT's in turn."
    ]
    return [*lines, "", *_steps(rows, "adapters")]


def experts(problems: list[dict]) -> list[str]:
    """Return the lines about the experts of mixtures."""
    lines = ["", "## The experts of a mixture", ""]
    lines += [
        "Those of Mixtral in transformers, run by `grouped_mm`; r = 16 on both weights of each "
        "expert, bf16, no dropout. The frozen block's backward makes dx and the gradient of the "
        "routing weights. *kept*: MiB from forward to backward; ratios are to the frozen block's."
    ]
    return [*lines, "", *_by_frozen(problems, "experts", block)]


def dora_layers(problems: list[dict]) -> list[str]:
    """Return the lines about layers with DoRA's magnitude."""
    lines = ["", "## A layer with DoRA", ""]
    lines += [
        "As PEFT computes it, `use_dora=True`. *kept*: MiB from forward to backward; ratios are to "
        "the frozen layer's, which keeps nothing. One token: forward alone, in evaluation."
    ]
    name = "{M} x {N} x {K}, dropout {p:g}"
    return [*lines, "", *_by_frozen(problems, "layer", lambda problem: name.format(**problem))]


def _by_frozen(problems: list[dict], what: str, name: Callable[[dict], str]) -> list[str]:
    """Return a table of all ways, their memory by the frozen one's as well."""
    lines = _head(EXPERTS_COLUMNS, f" {what} | adapters | ", "---|---|---")
    for problem in problems:
        frozen, cells = {}, []
        for row in problem["rows"]:
            frozen = row if row["way"] == "frozen" else frozen
            cells.append([*_times(row, 1), _cell(row, "ratio_to_peft", _ratio)])
            for key in ("kept_bytes", "peak_bytes"):
                by_frozen = row.get(key, 0) / frozen[key] if frozen.get(key) else None
                cells[-1] += [_mib(row, key), _cell(row, key, lambda _, by=by_frozen: _ratio(by))]
        about = f"{name(problem)} | {short(problem['adapter'])}"
        lines += _of_ways(problem, about, cells, EXPERTS_COLUMNS)
    return lines


def _of_ways(
    problem: dict, about: str, cells: list[list[str]], columns: tuple[str, ...]
) -> list[str]:
    """Return a line for each way, or the error that left none."""
    if "error" in problem:
        return [f"| {about} | {_error(problem)} |" + " |" * len(columns)]
    rows = zip(problem["rows"], cells, strict=True)
    return [_line(f"{about} | {row['way']}", of, row) for row, of in rows]


def _head(columns: tuple[str, ...], names: str = " ", aligned: str = "---") -> list[str]:
    """Return the first two lines of a table whose first columns are ``names``."""
    return [f"|{names}| " + " | ".join(columns) + " |", f"|{aligned}|" + "---:|" * len(columns)]


def _line(names: str, cells: list[str | None], row: dict) -> str:
    """Return a line of a table: in the place of the first figure that is missing, why it is."""
    if "error" in row and None in cells:
        cells[cells.index(None)] = _error(row)
    return f"| {names} | " + " | ".join(cell or "" for cell in cells) + " |"


def _error(of: dict) -> str:
    return textwrap.shorten(of["error"], MOST_OF_ERROR, placeholder=" …").replace("|", "\\|")


def _cell(row: dict, key: str, form: Callable[..., str]) -> str | None:
    return form(row[key]) if key in row else None


def _mib(row: dict, key: str, digits: int = 1) -> str | None:
    return _cell(row, key, lambda size: f"{size / 2**20:.{digits}f}")


def _times(row: dict, digits: int) -> list[str | None]:
    """Return the milliseconds and the ratio of each phase."""
    cells = []
    for phase in PHASES:
        cells.append(_cell(row, phase, lambda found: f"{found['median_s'] * 1e3:.{digits}f}"))
        cells.append(_cell(row, phase, lambda found: _ratio(found["ratio"])))
    return cells


def _rates(row: dict, ceiling: dict) -> list[str | None]:
    """Return the parts of the matrix rate and of the copy bandwidth that a layer reaches."""
    if "error" in ceiling:
        return [None, None]
    peak, copied = ceiling["matrix_flops_s"], ceiling["copy_bytes_s"]
    return [
        _cell(row, "both", lambda both: f"{both['tflops'] * 1e12 / peak:.0%}"),
        _cell(row, "both", lambda both: f"{both['bytes_s'] / copied:.0%}"),
    ]


def _with_host(row: dict) -> bool:
    return "with_host_s" in row.get("both", {})


def _host_cell(phase: dict) -> str | None:
    if "with_host_s" not in phase:
        return None
    return f"{phase['with_host_s'] * 1e3:.3f} ({_ratio(phase['with_host_ratio'])})"


def _predicted(row: dict) -> str | None:
    if not row.get("predicted_s"):
        return None
    seconds = row["predicted_s"]["both"]
    return f"{seconds * 1e3:.2f} ({row['both']['median_s'] / seconds - 1:+.0%})"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
