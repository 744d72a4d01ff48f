# SPDX-License-Identifier: Apache-2.0
"""What a run of the benchmarks shows: plots beside its JSON file."""

import sys
from pathlib import Path

from problems import block, short, title

from fastlora.files import replace_file

INK, GRID = "#33383d", "#e4e7ea"
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
    if measured["experts"]:
        pictures["experts"] = draw_experts
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
    for section in ("problems", "decoder_layers", "mixed_layers", "experts"):
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
    names = [f"{p['name']}, {p['tokens']} tokens, dropout {p['p']:g}" for p in chosen]
    _draw_blocks(chosen, names, "What LoRA costs a decoder layer", result, path)


def draw_experts(result: dict, path: Path) -> None:
    """The same of the experts of mixtures."""
    chosen = result["experts"]
    names = [f"{block(p)}, {short(p['adapter'])} adapters" for p in chosen]
    _draw_blocks(chosen, names, "What LoRA costs the experts of a mixture", result, path)


def _draw_blocks(
    chosen: list[dict], names: list[str], heading: str, result: dict, path: Path
) -> None:
    figure, axes = _figure(9, 1.6 + 0.5 * len(chosen))
    for way, colour in DECODER_COLOURS.items():
        at = [(i, _row(p, way)) for i, p in enumerate(chosen)]
        at = [(row["both"]["ratio"], i) for i, row in at if row and row["both"]["ratio"]]
        if at:
            style = {"color": colour, "markersize": 8, "alpha": 0.9}
            axes.plot(*zip(*at, strict=True), "o", label=way, **style)
    axes.axvline(1.0, color=COLOURS["frozen"], linewidth=1.5, label="frozen layer")
    axes.set_yticks(range(len(chosen)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel("forward + backward, time by the frozen layer's (less is better)", color=INK)
    axes.grid(axis="both", color=GRID)
    _finish(figure, axes, heading, result, path)


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
    _finish(figure, axes, f"Roofline, {short(dtype)}", result, path)


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
