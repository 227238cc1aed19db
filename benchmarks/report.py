"""The measurements as JSON, as a table and as a picture."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.contenders import (
    ALL,
    CASES,
    COMPILED,
    EAGER,
    HAND,
    HAND_COMPILED,
    HAND_RECORDED,
    JIT,
    MANY_TOGETHER,
    PYTHAE,
    SCAN,
    SEVERAL,
    STOCK,
    TOGETHER,
)
from benchmarks.evidence import lines as evidence_lines
from benchmarks.picture import picture
from benchmarks.timing import ratio

RATIOS = (
    (STOCK, COMPILED),
    (STOCK, SEVERAL),
    (STOCK, EAGER),
    (JIT, COMPILED),
    (COMPILED, HAND),
    (COMPILED, HAND_COMPILED),
    (COMPILED, HAND_RECORDED),
    (SEVERAL, HAND_RECORDED),
    (COMPILED, SCAN),
    (SEVERAL, SCAN),
    (STOCK, TOGETHER),
    (COMPILED, MANY_TOGETHER),
    (PYTHAE, COMPILED),
)
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "speed.png"


def write(results: dict[str, Any], folder: Path, name: str) -> str:
    """Write ``name.json`` and ``name.md`` into a folder, and the picture; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    results = _rounded(results)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (folder / f"{name}.md").write_text(table)
    if any(STOCK in found["milliseconds"] for sizes in results.get("cases", {}).values() for found in sizes.values()):
        picture(results["cases"], measure(results), PICTURE if name == _of_readme(folder) else folder / f"{name}.png")
    return table


def _of_readme(folder: Path) -> str | None:
    """Whose picture the README shows: of the measurements on a CPU those with the most threads."""
    threads = {path.stem: int(path.stem.split("_")[1]) for path in folder.glob("cpu_[0-9]*_thread*.json")}
    return max(threads, key=threads.__getitem__, default=None)


def measure(results: dict[str, Any]) -> str:
    """What is compared: processor time of one thread, for others may be at work there; else the clock.

    Of several threads the processor time counts those that wait for each other.
    """
    return "milliseconds" if results["device"] == "cuda" or results["threads"] > 1 else "processor milliseconds"


def markdown(results: dict[str, Any]) -> str:
    """Milliseconds for a step (median, quartiles), and the ratios that matter."""
    which = measure(results)
    lines = [
        f"{results['machine']}; {results['threads']} thread(s); {results['versions']}.",
        "",
        f"A training step, {which}: median [quartiles] of interleaved rounds. The JSON file has every round, by the "
        "clock and in processor time.",
    ]
    for case, sizes in results.get("cases", {}).items():
        lines += _case(case, sizes, which)
    lines += _alone(results.get("alone", {}))
    if results.get("evidence"):
        lines += ["", *evidence_lines(results["evidence"])]
    if results.get("growth"):
        lines += ["", "Processor milliseconds by size:", ""]
        for what, times in results["growth"].items():
            lines.append(f"* {what}: " + ", ".join(f"{size}: {value:.2f}" for size, value in times.items()))
    return "\n".join(lines) + "\n"


def _case(case: str, sizes: dict[str, Any], which: str) -> list[str]:
    head = " | ".join(f"batch {size}" for size in sizes)
    names = [name for name in ALL if any(name in found[which] for found in sizes.values())]
    lines = ["", f"### {case}: {CASES[case]}", "", f"| | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for name in names:
        cells = [_spread(found[which][name]) if name in found[which] else "-" for found in sizes.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"| median of ratios of pairs | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for above, below in RATIOS:
        if above in names and below in names:
            times = [found[which] for found in sizes.values()]
            cells = [_ratio(ratio(t, above, below)) if above in t and below in t else "-" for t in times]
            lines.append(f"| {above} / {below} | " + " | ".join(cells) + " |")
    reasons = {name: why for found in sizes.values() for name, why in found["missing"].items()}
    return lines + [""] * bool(reasons) + [f"* {name}: {why}" for name, why in reasons.items()]


def _alone(alone: dict[str, Any]) -> list[str]:
    lines = ["", "| vae alone, cold caches | import and start s | first steps s | peak MiB |", "|---|---|---|---|"]
    for name, own in alone.items():
        seconds = f"{own['start seconds']:.1f} | {own['first steps seconds']:.1f}"
        lines.append(f"| {name} | {seconds} | {own['peak MiB']:.0f} |")
    return lines if alone else []


def _rounded(value: Any) -> Any:
    """Five digits are more than were measured."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low quartile']:.2f}, {found['high quartile']:.2f}]"
