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
    lines = [f"{results['machine']}; {results['threads']} thread(s); {results['versions']}.", ""]
    lines += ["Milliseconds for a training step: median [quartiles] of interleaved rounds.", ""]
    lines += ["| | " + " | ".join(f"batch {size}" for size in sizes) + " | import s | first steps s | peak MiB |"]
    lines += ["|---" * (len(sizes) + 4) + "|"]
    for contender in results["milliseconds"][sizes[0]]:
        cells = [_spread(results["milliseconds"][size][contender]) for size in sizes]
        own = results["alone"].get(contender)
        extra = [f"{own[key]:.1f}" for key in ("import seconds", "first steps seconds")] if own else ["", ""]
        cells += [*extra, f"{own['peak MiB']:.0f}" if own else ""]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    lines += ["", "| ratio of medians of pairs | " + " | ".join(f"batch {size}" for size in sizes) + " |"]
    lines += ["|---" * (len(sizes) + 1) + "|"]
    for ratio in results["ratios"][sizes[0]]:
        lines.append(f"| {ratio} | " + " | ".join(_ratio(results["ratios"][size][ratio]) for size in sizes) + " |")
    if evidence := results.get("evidence"):
        lines += ["", f"log p(x), {evidence['particles']} samples, over the decoder's matrix products alone: "]
        lines[-1] += ", ".join(f"{name} {_ratio(ratio)}" for name, ratio in evidence["ratios"].items()) + "."
    return "\n".join(lines) + "\n"


def picture(results: dict[str, Any], path: Path) -> None:
    """A panel for each batch size, a bar for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(results["milliseconds"])
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.5), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        times = results["milliseconds"][size]
        medians = [statistics.median(times[name]) for name in times]
        colors = ["C1" if name.startswith("ours") else "C7" for name in times]
        axis.barh(range(len(times)), medians, color=colors)
        axis.bar_label(axis.containers[0], fmt="%.2f", fontsize=8)
        axis.set_yticks(range(len(times)), list(times), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"batch {size}")
        axis.set_xlabel("milliseconds per step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low quartile']:.2f}, {ratio['high quartile']:.2f}]"
