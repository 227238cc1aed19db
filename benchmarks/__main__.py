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

    from benchmarks.contenders import contenders_on
    from benchmarks.report import write

    torch.set_num_threads(options.threads)
    results = _earlier(RESULTS / f"{name}.json") if options.add else {}
    try:
        _check(options)
        conditions = _conditions(options, results)
        images = _images(options)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    results.update(conditions)
    names = [each for each in contenders_on(options.device) if options.only.lower() in each.lower()]
    _measure_steps(options, names, results)
    write(results, RESULTS, name)  # kept, whatever may come
    _measure_rest(options, names, images, results)
    print(write(results, RESULTS, name))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what cannot be."""
    import torch

    from benchmarks.contenders import CASES

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU that torch can use; accepted here: cpu")
    if unknown := [case for case in options.case if case not in CASES]:
        raise ValueError(f"no case {unknown[0]}; accepted: {', '.join(CASES)}")


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


def _images(options: argparse.Namespace) -> Any:
    from benchmarks.evidence import images

    return images(options.evidence, options.root) if options.evidence and options.device == "cpu" else None


def _measure_rest(options: argparse.Namespace, names: list[str], images: Any, results: dict[str, Any]) -> None:
    from benchmarks.contenders import Missing
    from benchmarks.evidence import evidence
    from benchmarks.growth import growth
    from benchmarks.timing import alone

    if options.alone:
        for name in names:
            print(f"{name}, alone ...", flush=True)
            try:
                own = alone(name, "vae", options.batch[0], options.threads, options.device)
                results.setdefault("alone", {})[name] = own
            except Missing as why:
                print(f"{name} is left out: {why}", flush=True)
    if images is not None:
        print("log p(x) ...", flush=True)
        results["evidence"] = evidence(images[0], images[1], options.particles)
    if options.growth and options.device == "cpu":
        print("growth ...", flush=True)
        results["growth"] = growth()


def _conditions(options: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """What is measured with. Earlier rows of a package that is no longer here are those of the version it had.

    Raises:
        ValueError: earlier measurements were made with something else.
    """
    import importlib.metadata

    import torch

    packages = ("torch", "pyro-ppl", "numpyro", "jax", "pythae")
    installed = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    before = dict(each.rsplit(" ", 1) for each in earlier.get("versions", "").split(", ") if each)
    versions = [f"{name} {installed.get(name) or before.get(name, 'not installed')}" for name in packages]
    processor = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor}, {os.cpu_count()} cores"
    conditions = {
        "machine": f"{platform.system()} {platform.machine()}, {device}",
        "device": options.device,
        "threads": options.threads,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }
    if other := [key for key in conditions if key in earlier and earlier[key] != conditions[key]]:
        was, now = earlier[other[0]], conditions[other[0]]
        raise ValueError(f"--add to {other[0]} {was}, where now it is {now}; accepted: another --name")
    return conditions


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
    parser.add_argument("--case", nargs="*", default=cases, help=f"models, of {', '.join(cases)}, or none")
    parser.add_argument("--batch", type=int, nargs="+", default=[20, 100, 1000], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=30, help="limit on the turns of a case at one batch size")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="no import time, compile time, memory")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="no growth with sizes")
    parser.add_argument("--evidence", type=int, default=20, help="images for the cost of log p(x); 0 leaves it out")
    parser.add_argument("--root", default="", help="folder with MNIST: log p(x) of its test images, not of random bits")
    parser.add_argument("--particles", type=int, default=5000, help="samples for log p(x)")
    parser.add_argument("--add", action="store_true", help="keep what earlier runs measured and this one does not")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and picture of an earlier run")
    parser.add_argument("--name", default="", help="name of the files in benchmarks/results")
    return parser.parse_args()


def _limit_threads(threads: int) -> None:
    """Before anything is imported that counts cores, or takes a GPU's memory, for itself."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    if threads == 1:
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


if __name__ == "__main__":
    sys.exit(main())
