# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmarks says: a Markdown table and plots beside its JSON file.

python benchmarks/report.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, GRID = "#33383d", "#e4e7ea"
COLUMNS = ("forward", "ratio", "backward", "ratio", "both", "ratio")
COLUMNS += ("of peak", "of copy", "kept", "peak")
COLOURS = {
    "fastlora torch": "#2a78b8",
    "fastlora plain": "#12c2e9",
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


def write(path: Path) -> None:
    """Write PATH.md and the plots from the JSON file ``path``."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(result))
    draw_ratios(result, path.with_name(f"{path.stem}-ratio.png"))
    draw_tokens(result, path.with_name(f"{path.stem}-tokens.png"))
    draw_roofline(result, path.with_name(f"{path.stem}-roofline.png"))
    if result.get("decoder_layers"):
        draw_decoders(result, path.with_name(f"{path.stem}-decoder.png"))
    if result["end_to_end"]:
        draw_memory(result, path.with_name(f"{path.stem}-memory.png"))


def markdown(result: dict) -> str:
    """Return the table, a section for each problem."""
    machine = result["machine"]
    lines = [f"# {machine['device']}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in machine.items() if k != "device") + ".", ""]
    for dtype, c in result["ceilings"].items():
        lines.append(
            f"Measured ceilings, {_short(dtype)}: {c['copy_bytes_s'] / 1e9:.1f} GB/s copied, "
            f"{c['matrix_flops_s'] / 1e12:.2f} TFLOP/s multiplied."
        )
    lines += [
        "",
        "Times are medians in milliseconds; ratios are medians, over rounds in which all ways took "
        "turns, of a way's time to the frozen layer's (its backward makes dx alone). *kept*: bytes "
        "from forward to backward, for each element of x. *peak*: what one step allocates, MiB. "
        "*of peak*, *of copy*: of the measured matrix rate and copy bandwidth, both directions "
        "together, if every wide tensor moved once.",
    ]
    modelled = [r for p in result["problems"] for r in p["rows"] if r.get("predicted_s")]
    columns = (*COLUMNS, "predicted") if modelled else COLUMNS
    if modelled:
        lines[-1] += (
            " *predicted*: milliseconds of both directions by the model of the GPU, and how "
            "far the measurement is from them."
        )
    for problem in result["problems"]:
        lines += ["", f"## {title(problem)}", ""]
        lines.append("| | " + " | ".join(columns) + " |")
        lines.append("|---|" + "---:|" * len(columns))
        ceiling = result["ceilings"][problem["dtype"]]
        for row in problem["rows"]:
            cells = []
            for phase in ("forward", "backward", "both"):
                cells += [f"{row[phase]['median_s'] * 1e3:.2f}", f"{row[phase]['ratio']:.2f}"]
            cells.append(f"{row['both']['tflops'] * 1e12 / ceiling['matrix_flops_s']:.0%}")
            cells.append(f"{row['both']['bytes_s'] / ceiling['copy_bytes_s']:.0%}")
            cells.append(f"{row['kept_bytes'] / (problem['M'] * problem['K']):.2f}")
            cells.append(f"{row['peak_bytes'] / 2**20:.1f}")
            if modelled:
                cells.append(_predicted(row))
            lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    if result.get("decoder_layers"):
        lines += decoders(result["decoder_layers"])
    if result["end_to_end"]:
        lines += ["", "## A training step of a whole model", ""]
        lines += ["Random weights, bf16, r = 16 on every linear, dropout 0.05."]
        columns = ("tokens", "s a step", "by PEFT's", "tokens/s", "peak MiB", "GFLOP a token")
        lines += ["", "| model | batch | | " + " | ".join(columns) + " |"]
        lines.append("|---|---:|---|" + "---:|" * len(columns))
        for row in result["end_to_end"]:
            lines.append(
                f"| {row['model']} | {row['batch']} | {row['way']} | {row['tokens']} | "
                f"{row['step_s']:.3f} | "
                f"{_ratio(row['ratio_to_peft'])} | {row['tokens_s']:.0f} | "
                f"{row['peak_bytes'] / 2**20:.0f} | {row['flops_per_token'] / 1e9:.3f} |"
            )
    missing = sorted(set(COLOURS) - {r["way"] for p in result["problems"] for r in p["rows"]})
    if missing:
        lines += ["", f"Not measured on this machine: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def decoders(problems: list[dict]) -> list[str]:
    """Return the lines about whole decoder layers."""
    lines = ["", "## The linear layers and the MLP of a decoder layer", ""]
    lines += [
        "q, k, v, o and a gated MLP without attention; bf16, r = 16 on all seven. *kept*: MiB from "
        "forward to backward. *launches*: kernels on a GPU, library calls on a CPU."
    ]
    columns = "forward", "ratio", "backward", "ratio", "both", "ratio", "kept", "peak", "launches"
    for problem in problems:
        name = f"{problem['name']}, {problem['tokens']} tokens, dropout {problem['p']:g}"
        lines += ["", f"### {name}", "", "| | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for row in problem["rows"]:
            cells = []
            for phase in ("forward", "backward", "both"):
                cells += [f"{row[phase]['median_s'] * 1e3:.1f}", f"{row[phase]['ratio']:.2f}"]
            cells += [f"{row[size] / 2**20:.1f}" for size in ("kept_bytes", "peak_bytes")]
            cells.append(str(row["launches"]))
            lines.append(f"| {row['way']} | " + " | ".join(cells) + " |")
    return lines


def title(problem: dict) -> str:
    """Return one line that says what was measured."""
    adapter = _short(problem["adapter"])
    mixed = f", {adapter} adapters" if problem["adapter"] != problem["dtype"] else ""
    return (
        f"{problem['name']}: {problem['M']} x {problem['N']} x {problem['K']}, r = {problem['R']}, "
        f"{_short(problem['dtype'])}{mixed}, dropout {problem['p']:g}"
    )


def draw_ratios(result: dict, path: Path) -> None:
    """Time of forward and backward by the frozen layer's, for each problem and way."""
    chosen = [p for p in result["problems"] if p["M"] >= 256]
    figure, axes = _figure(9, 1.6 + 0.42 * len(chosen))
    for way, colour in COLOURS.items():
        at = [(i, _row(p, way)) for i, p in enumerate(chosen)]
        at = [(row["both"]["ratio"], i) for i, row in at if row is not None]
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
        at = [(row, i) for i, p in enumerate(chosen) if (row := _row(p, way)) is not None]
        if at:
            xs, ys = zip(*((row["both"]["ratio"], i) for row, i in at), strict=True)
            axes.plot(xs, ys, "o", color=colour, label=way, markersize=8, alpha=0.9)
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
    peak, bandwidth = ceiling["matrix_flops_s"], ceiling["copy_bytes_s"]
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
                at = [(r["batch"], r["peak_bytes"] / 2**20) for r in rows]
                label, colour = f"{way}, {model}", DECODER_COLOURS[way]
                axes.plot(*zip(*at, strict=True), "o-", color=colour, label=label)
    axes.set_ylim(bottom=0)
    tokens = result["end_to_end"][0]["tokens"]
    axes.set_xlabel(f"rows of {tokens} tokens in a batch", color=INK)
    axes.set_ylabel("allocated by one step at its peak, MiB", color=INK)
    axes.grid(color=GRID)
    _finish(figure, axes, "Memory of a training step", result, path)


def _figure(width: float, height: float):
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
    figure.savefig(path)


def _row(problem: dict, way: str) -> dict | None:
    return next((row for row in problem["rows"] if row["way"] == way), None)


def _like_the_first(problem: dict, result: dict, but: str) -> bool:
    first = result["problems"][0]
    fields = ("name", "M", "N", "K", "R", "p", "dtype", "adapter")
    return all(problem[f] == first[f] for f in fields if f != but)


def _ratio(value: float | None) -> str:
    return "no PEFT" if value is None else f"{value:.2f}"


def _predicted(row: dict) -> str:
    if not row.get("predicted_s"):
        return ""
    seconds = row["predicted_s"]["both"]
    return f"{seconds * 1e3:.2f} ({row['both']['median_s'] / seconds - 1:+.0%})"


def _short(dtype: str) -> str:
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[dtype]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
