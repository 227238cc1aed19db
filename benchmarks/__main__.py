"""``python -m benchmarks``: one command, one table. ``--help`` lists what can be left out."""

import argparse
import os
import platform
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure, write ``benchmarks/results/``, print the table."""
    options = _options()
    _limit_threads(options.threads)
    import pyro
    import torch

    from benchmarks.contenders import CONTENDERS
    from benchmarks.evidence import evidence_times
    from benchmarks.report import COMPILED, HAND, STOCK, write
    from benchmarks.timing import alone, interleaved, ratios

    torch.set_num_threads(options.threads)
    names = [name for name in CONTENDERS if options.only.lower() in name.lower()] if options.only else list(CONTENDERS)
    results: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "threads": options.threads,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}",
        "milliseconds": {},
        "processor milliseconds": {},
        "ratios": {},
        "alone": {},
    }
    for size in options.batch:
        print(f"batch {size} ...", flush=True)
        times, processor = interleaved(names, size, options.rounds, max(2, min(20, 2000 // size)))
        results["milliseconds"][str(size)], results["processor milliseconds"][str(size)] = times, processor
        wanted = {
            f"{above} / {below}": (above, below)
            for above, below in ((COMPILED, HAND), (STOCK, COMPILED), (STOCK, f"{COMPILED}, Pyro's Trace_ELBO"))
            if above in times and below in times
        }
        results["ratios"][str(size)] = {
            f"{label}, {by}": ratios(measured, *pair)
            for label, pair in wanted.items()
            for by, measured in (("by the clock", times), ("processor time", processor))
        }
    for name in [] if options.quick else names:
        print(f"{name}, alone ...", flush=True)
        results["alone"][name] = alone(name, options.batch[0], options.threads)
    if options.evidence:
        print("log p(x) ...", flush=True)
        times = evidence_times(options.evidence, options.particles, 7)
        against = {
            f"{name} over {products}": ratios(times, name, products)
            for name in ("eager", "compiled")
            for products in ("products", "products by oneDNN")
        }
        results["evidence"] = {"particles": options.particles, "processor seconds": times, "ratios": against}
    print(write(results, Path(__file__).parent / "results", options.name))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads for every contender")
    parser.add_argument("--batch", type=int, nargs="+", default=[20, 100, 1000], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each contender")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--quick", action="store_true", help="leave out import time, compile time and memory")
    parser.add_argument("--evidence", type=int, default=20, help="images for the cost of log p(x); 0 leaves it out")
    parser.add_argument("--particles", type=int, default=5000, help="samples for log p(x)")
    parser.add_argument("--name", default="cpu", help="name of the files in benchmarks/results")
    return parser.parse_args()


def _limit_threads(threads: int) -> None:
    """Before anything that counts cores for itself is imported."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


if __name__ == "__main__":
    main()
