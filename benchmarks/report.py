# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmarks says: a Markdown table and plots beside its JSON file.

python benchmarks/report.py benchmarks/results/*.json
"""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from fastlora.files import replace_file

INK, GRID = "#33383d", "#e4e7ea"
PHASES = ("forward", "backward", "both")
TIMES = ("forward", "ratio", "backward", "ratio", "both", "ratio")
COLUMNS = (*TIMES, "of peak", "of copy", "kept", "peak")
DECODER_COLUMNS = ("kept", "peak", "launches")
MIXED_COLUMNS = (*TIMES, "by PEFT's", "peak")
MODEL_COLUMNS = ("tokens", "s a step", "by PEFT's", "tokens/s", "peak MiB", "GFLOP a token")
MOST_OF_ERROR = 120  # characters in a table; the JSON file has the whole line
COLOURS = {
    "fastlora blocks": "#2a78b8",
    "fastlora eager": "#12c2e9",
    "fastlora library": "#59a5d8",
    "fastlora triton": "#1b3f66",
    "PEFT": "#d1495b",
    "PEFT compiled": "#e8a0aa",
    "loralib": "#8d6a9f",
    "addmm (Unsloth, Axolotl)": "#c98f2b",
    "LoRAFusion schedule": "#5b8c5a",
    "frozen": "#8a9199",
}
DECODER_COLOURS = {
    "fastlora, siblings": "#1b3f66",
    "fastlora": "#59a5d8",
    "hand-fused (Unsloth)": "#c98f2b",
    "PEFT": "#d1495b",
    "PEFT compiled": "#e8a0aa",
}


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
        lines.append(f"Measured ceilings, {_short(dtype)}: {found}")
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
        cells.append(_cell(row, "peak_bytes", lambda size: f"{size / 2**20:.1f}"))
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
            for key in ("kept_bytes", "peak_bytes"):
                cells.append(_cell(row, key, lambda size: f"{size / 2**20:.1f}"))
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
            _cell(row, "peak_bytes", lambda size: f"{size / 2**20:.0f}"),
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
        if "error" in problem:
            lines.append(f"| {about} | {_error(problem)} |" + " |" * len(MIXED_COLUMNS))
        for row in problem["rows"]:
            cells = _times(row, 2)
            cells.append(_cell(row, "ratio_to_peft", _ratio))
            cells.append(_cell(row, "peak_bytes", lambda size: f"{size / 2**20:.1f}"))
            lines.append(_line(f"{about} | {row['way']}", cells, row))
    return lines


def mixed_models(rows: list[dict]) -> list[str]:
    """Return the lines about training steps for several adapters."""
    lines = ["", "## A training step for several adapters", ""]
    lines += [
        "As above, a batch of 8 with as many rows for each adapter: together in one batch, or one "
        "adapter after another on its own rows. *by PEFT's*: by PEFT's in turn."
    ]
    return [*lines, "", *_steps(rows, "adapters")]


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


def title(problem: dict) -> str:
    """Return one line that says what was measured."""
    adapter = _short(problem["adapter"])
    mixed = f", {adapter} adapters" if problem["adapter"] != problem["dtype"] else ""
    kept = problem.get("weights", "dense")
    weights = f", {kept} weights" if kept != "dense" else ""
    return (
        f"{problem['name']}: {problem['M']} x {problem['N']} x {problem['K']}, r = {problem['R']}, "
        f"{_short(problem['dtype'])}{mixed}{weights}, dropout {problem['p']:g}"
    )


def draw(result: dict, path: Path) -> None:
    """Draw what there is to draw beside ``path``; a picture that fails costs itself alone."""
    measured, pictures = _measured(result), {}
    if measured["problems"]:
        pictures |= {"ratio": draw_ratios, "tokens": draw_tokens, "roofline": draw_roofline}
    if measured["decoder_layers"]:
        pictures["decoder"] = draw_decoders
    if measured["end_to_end"]:
        pictures["memory"] = draw_memory
    if measured["mixed_layers"]:
        pictures["mixed"] = draw_mixed
    for name, picture in pictures.items():
        try:
            picture(measured, path.with_name(f"{path.stem}-{name}.png"))
        except ImportError as error:
            print(f"no pictures: {error}", file=sys.stderr)
            return
        except Exception as error:
            print(f"no picture of {name}: {type(error).__name__}: {error}", file=sys.stderr)


def _measured(result: dict) -> dict:
    """Return ``result`` with nothing but what has figures."""
    found = {**result}
    for section in ("problems", "decoder_layers", "mixed_layers"):
        rows_of = [
            {**problem, "rows": [row for row in problem["rows"] if "both" in row]}
            for problem in result.get(section, ())
        ]
        found[section] = [problem for problem in rows_of if problem["rows"]]
    found["end_to_end"] = [row for row in result.get("end_to_end", ()) if "peak_bytes" in row]
    return found


def draw_ratios(result: dict, path: Path) -> None:
    """Time of forward and backward by the frozen layer's, for each problem and way."""
    chosen = [p for p in result["problems"] if p["M"] >= 256]
    figure, axes = _figure(9, 1.6 + 0.42 * len(chosen))
    for way, colour in COLOURS.items():
        at = [(i, _row(p, way)) for i, p in enumerate(chosen)]
        at = [(row["both"]["ratio"], i) for i, row in at if row and row["both"]["ratio"]]
        if way != "frozen" and at:
            style = {"color": colour, "markersize": 7, "alpha": 0.9}
            above = 3 if way.startswith("fastlora") else 2
            axes.plot(*zip(*at, strict=True), "o", label=way, zorder=above, **style)
    axes.axvline(1.0, color=COLOURS["frozen"], linewidth=1.5, label="frozen layer")
    axes.set_yticks(range(len(chosen)), [title(p) for p in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("forward + backward, time by the frozen layer's (less is better)", color=INK)
    axes.grid(axis="both", color=GRID)
    _finish(figure, axes, "What LoRA costs", result, path)


def draw_decoders(result: dict, path: Path) -> None:
    """Time of forward and backward of decoder layers by the frozen layer's."""
    chosen = result["decoder_layers"]
    figure, axes = _figure(9, 1.6 + 0.5 * len(chosen))
    for way, colour in DECODER_COLOURS.items():
        at = [(i, _row(p, way)) for i, p in enumerate(chosen)]
        at = [(row["both"]["ratio"], i) for i, row in at if row and row["both"]["ratio"]]
        if at:
            style = {"color": colour, "markersize": 8, "alpha": 0.9}
            axes.plot(*zip(*at, strict=True), "o", label=way, **style)
    axes.axvline(1.0, color=COLOURS["frozen"], linewidth=1.5, label="frozen layer")
    names = [f"{p['name']}, {p['tokens']} tokens, dropout {p['p']:g}" for p in chosen]
    axes.set_yticks(range(len(chosen)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("forward + backward, time by the frozen layer's (less is better)", color=INK)
    axes.grid(axis="both", color=GRID)
    _finish(figure, axes, "What LoRA costs a decoder layer", result, path)


def draw_tokens(result: dict, path: Path) -> None:
    """Time against the number of tokens."""
    chosen = [p for p in result["problems"] if _like_the_first(p, result, "M")]
    figure, axes = _figure(8, 4.8)
    for way, colour in COLOURS.items():
        at = sorted((p["M"], _row(p, way)["both"]["median_s"]) for p in chosen if _row(p, way))
        if len(at) > 1:
            axes.plot(*zip(*at, strict=True), "o-", color=colour, label=way)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens", color=INK)
    axes.set_ylabel("forward + backward, seconds", color=INK)
    axes.grid(color=GRID)
    _finish(figure, axes, f"Time against tokens: {chosen[0]['name']}", result, path)


def draw_roofline(result: dict, path: Path) -> None:
    """Rate against arithmetic intensity, under both ceilings measured in the same run."""
    dtype = result["problems"][0]["dtype"]
    ceiling = result["ceilings"][dtype]
    figure, axes = _figure(8, 4.8)
    for way, colour in COLOURS.items():
        at = []
        for p in result["problems"]:
            row = _row(p, way)
            if row is None or p["dtype"] != dtype:
                continue
            both = row["both"]
            at.append((both["tflops"] * 1e12 / both["bytes_s"], both["tflops"]))
        if at:
            axes.plot(*zip(*at, strict=True), "o", color=colour, label=way, markersize=5, alpha=0.8)
    if "error" not in ceiling:
        peak, bandwidth = ceiling["matrix_flops_s"], ceiling["copy_bytes_s"]
        intensities = sorted([0.3, peak / bandwidth, 3000.0])
        roof = [min(peak, bandwidth * i) / 1e12 for i in intensities]
        axes.plot(intensities, roof, color=INK, linewidth=1.5, label="measured ceilings")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, FLOP per byte of the wide tensors", color=INK)
    axes.set_ylabel("TFLOP/s, forward + backward", color=INK)
    axes.grid(color=GRID)
    _finish(figure, axes, f"Roofline, {_short(dtype)}", result, path)


def draw_memory(result: dict, path: Path) -> None:
    """Peak memory of a training step against the batch size."""
    figure, axes = _figure(8, 4.8)
    for model in sorted({row["model"] for row in result["end_to_end"]}):
        for way in ("fastlora", "fastlora, siblings", "PEFT"):
            rows = [r for r in result["end_to_end"] if (r["model"], r["way"]) == (model, way)]
            if rows:
                at = sorted((r["batch"], r["peak_bytes"] / 2**20) for r in rows)
                label, colour = f"{way}, {model}", DECODER_COLOURS[way]
                marks = "s" if model.endswith("NF4") else "o-"
                axes.plot(*zip(*at, strict=True), marks, color=colour, label=label)
    axes.set_ylim(bottom=0)
    tokens = result["end_to_end"][0]["tokens"]
    axes.set_xlabel(f"rows of {tokens} tokens in a batch", color=INK)
    axes.set_ylabel("allocated by one step at its peak, MiB", color=INK)
    axes.grid(color=GRID)
    _finish(figure, axes, "Memory of a training step", result, path)


def draw_mixed(result: dict, path: Path) -> None:
    """Time of a layer by the frozen one's against the number of adapters in a batch."""
    most = max(p["M"] for p in result["mixed_layers"])
    chosen = [p for p in result["mixed_layers"] if p["M"] == most and not p["by_turns"]]
    figure, axes = _figure(8, 4.8)
    for way in ("fastlora", "PEFT"):
        at = [(p["adapters"], _row(p, way)) for p in chosen]
        at = sorted((n, row["both"]["ratio"]) for n, row in at if row and row["both"]["ratio"])
        if at:
            axes.plot(*zip(*at, strict=True), "o-", color=DECODER_COLOURS[way], label=way)
    axes.axhline(1.0, color=COLOURS["frozen"], linewidth=1.5, label="frozen layer")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("adapters in a batch", color=INK)
    axes.set_ylabel("forward + backward, time by the frozen layer's", color=INK)
    axes.grid(color=GRID)
    title_of = title(result["mixed_layers"][0]).partition(": ")[2]
    _finish(figure, axes, f"Adapters mixed in one batch: {title_of}", result, path)


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure, axes, title: str, result: dict, path: Path) -> None:
    m = result["machine"]
    axes.set_title(title, loc="left", color=INK, weight="bold", pad=24)
    where = f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}"
    axes.text(0, 1.02, where, transform=axes.transAxes, color=INK, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    if axes.get_legend_handles_labels()[0]:  # a short run may have nothing to draw
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def _row(problem: dict, way: str) -> dict | None:
    return next((row for row in problem["rows"] if row["way"] == way), None)


def _like_the_first(problem: dict, result: dict, but: str) -> bool:
    first = result["problems"][0]
    fields = ("name", "M", "N", "K", "R", "p", "dtype", "adapter")
    return all(problem[f] == first[f] for f in fields if f != but)


def _short(dtype: str) -> str:
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[dtype]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
