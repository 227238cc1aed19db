"""The measurements as JSON, as a table and as a picture."""

import json
import statistics
from pathlib import Path
from typing import Any

HAND, STOCK, COMPILED = "PyTorch by hand, fused Adam", "Pyro SVI, Trace_ELBO", "ours, compiled"


def write(results: dict[str, Any], folder: Path, name: str) -> str:
    """Write ``name.json``, ``name.md`` and ``name.png`` into a folder; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (folder / f"{name}.md").write_text(table)
    picture(results, folder / f"{name}.png")
    return table


def markdown(results: dict[str, Any]) -> str:
    """Milliseconds for a step (median, quartiles), and the ratios that matter."""
    sizes = list(results["milliseconds"])
    head = " | ".join(f"batch {size}" for size in sizes)
    lines = [f"{results['machine']}; {results['threads']} thread(s); {results['versions']}."]
    for title, key in (("by the clock", "milliseconds"), ("of processor time", "processor milliseconds")):
        lines += ["", f"Milliseconds {title} for a training step: median [quartiles] of interleaved rounds.", ""]
        lines += [f"| | {head} |", "|---" * (len(sizes) + 1) + "|"]
        for contender in results[key][sizes[0]]:
            cells = [_spread(results[key][size][contender]) for size in sizes]
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    lines += ["", f"| median of ratios of pairs | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for ratio in results["ratios"][sizes[0]]:
        lines.append(f"| {ratio} | " + " | ".join(_ratio(results["ratios"][size][ratio]) for size in sizes) + " |")
    if results["alone"]:
        lines += [
            "",
            f"| alone, batch {sizes[0]}, cold caches | start s | first steps s | peak MiB |",
            "|---|---|---|---|",
        ]
    for contender, own in results["alone"].items():
        seconds = f"{own['start seconds']:.1f} | {own['first steps seconds']:.1f}"
        lines.append(f"| {contender} | {seconds} | {own['peak MiB']:.0f} |")
    if evidence := results.get("evidence"):
        lines += [
            "",
            f"log p(x), {evidence['particles']} samples, processor time over the decoder's products alone:",
            "",
        ]
        lines += [f"* {name}: {_ratio(ratio)}" for name, ratio in evidence["ratios"].items()]
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any], path: Path) -> None:
    """A panel for each batch size, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(results["milliseconds"])
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.5), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        times = results["processor milliseconds"][size]
        medians = [statistics.median(times[name]) for name in times]
        colors = ["C1" if name.startswith("ours") else "C7" for name in times]
        axis.barh(range(len(times)), medians, color=colors)
        axis.bar_label(axis.containers[0], fmt="%.2f", fontsize=8)
        axis.set_yticks(range(len(times)), list(times), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"batch {size}")
        axis.set_xlabel("processor milliseconds per step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low quartile']:.2f}, {ratio['high quartile']:.2f}]"
