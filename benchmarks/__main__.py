"""``python -m benchmarks``: one command, one table. ``--help`` lists what can be left out."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure, write ``benchmarks/results/`` and the README's picture, print the table; returns the exit status."""
    options = _options()
    name = options.name or f"{options.device}_{options.threads}_thread{'s' if options.threads > 1 else ''}"
    if options.draw:
        return _draw(name)
    _limit_threads(options.threads)
    import torch

    from benchmarks.contenders import ALL, CASES
    from benchmarks.report import write

    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda needs an NVIDIA GPU that torch can use; accepted here: cpu", file=sys.stderr)
        return 2
    if unknown := [case for case in options.case if case not in CASES]:
        print(f"benchmarks: no case {unknown[0]}; accepted: {', '.join(CASES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    names = [each for each in ALL if options.only.lower() in each.lower()]
    results = _earlier(RESULTS / f"{name}.json") if options.add else {}
    results.update(_conditions(options))
    _measure_steps(options, names, results)
    _measure_rest(options, names, results)
    print(write(results, RESULTS, name))
    return 0


def _draw(name: str) -> int:
    """Table and picture of what was measured before."""
    results = _earlier(RESULTS / f"{name}.json")
    if not results:
        kept = ", ".join(sorted(path.stem for path in RESULTS.glob("c*_thread*.json")))
        print(f"benchmarks: {name} was not measured; accepted: --draw with --name {kept}", file=sys.stderr)
        return 2
    from benchmarks.report import write

    print(write(results, RESULTS, name))
    return 0


def _measure_steps(options: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    from benchmarks.timing import interleaved

    for case in options.case:
        for size in options.batch:
            print(f"{case}, batch {size} ...", flush=True)
            found = interleaved(case, names, size, options.rounds, options.seconds, options.device)
            found["load"] = os.getloadavg()[0]
            results.setdefault("cases", {}).setdefault(case, {})[str(size)] = found


def _measure_rest(options: argparse.Namespace, names: list[str], results: dict[str, Any]) -> None:
    from benchmarks.evidence import evidence_times
    from benchmarks.growth import growth
    from benchmarks.timing import alone, ratio

    if options.alone:
        for name in names:
            print(f"{name}, alone ...", flush=True)
            own = alone(name, "vae", options.batch[0], options.threads, options.device)
            results.setdefault("alone", {})[name] = own
    if options.evidence and options.device == "cpu":
        print("log p(x) ...", flush=True)
        times = evidence_times(options.evidence, options.particles, 9)
        against = {
            f"{name} over {products}": ratio(times, name, products)
            for name in ("eager", "compiled")
            for products in ("products", "products by oneDNN")
        }
        sizes = {"particles": options.particles, "images": options.evidence}
        results["evidence"] = {**sizes, "seconds": times, "ratios": against}
    if options.growth and options.device == "cpu":
        print("growth ...", flush=True)
        results["growth"] = growth()


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    import importlib.metadata

    import torch

    packages = ("torch", "pyro-ppl", "numpyro", "jax", "pythae")
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    versions = [f"{name} {installed.get(name, 'not installed')}" for name in packages]
    processor = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor}, {os.cpu_count()} cores"
    return {
        "machine": f"{platform.system()} {platform.machine()}, {device}",
        "device": options.device,
        "threads": options.threads,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _earlier(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cases = ["vae", "iaf", "iwae", "vamp", "gmm", "vq"]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the steps are taken")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads for every contender")
    parser.add_argument("--case", nargs="*", default=cases, help=f"models, of {', '.join(cases)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[20, 100, 1000], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=30, help="limit on the turns of a case at one batch size")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="no import time, compile time, memory")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="no growth with sizes")
    parser.add_argument("--evidence", type=int, default=20, help="images for the cost of log p(x); 0 leaves it out")
    parser.add_argument("--particles", type=int, default=5000, help="samples for log p(x)")
    parser.add_argument("--add", action="store_true", help="keep what earlier runs measured and this one does not")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and picture of an earlier run")
    parser.add_argument("--name", default="", help="name of the files in benchmarks/results")
    return parser.parse_args()


def _limit_threads(threads: int) -> None:
    """Before anything that counts cores for itself is imported."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


if __name__ == "__main__":
    sys.exit(main())
