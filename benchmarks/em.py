"""``python -m benchmarks.em``: EM of a mixture and K-means beside scikit-learn's, from one start to one tolerance.

The mixture: 64 full covariances over MNIST's 60,000 training images reduced to 50 principal components, until log p(x)
per datum rises by less than the tolerance in an iteration, which is scikit-learn's rule. K-means: 64 codes of the same
images as they are, until it stands still. Each round gives each contender its turn, so that a busy moment is busy for
both.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ("float32", "float64", "codes")  # mixtures in either precision, K-means


def main() -> None:
    """Measure, write ``benchmarks/results/em_*``, print the table."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    import sklearn
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, where the iterations end before the tolerance is met
        results = {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "load": os.getloadavg()[0],
            "threads": options.threads,
            "versions": f"torch {torch.__version__}, scikit-learn {sklearn.__version__}",
            "rounds": options.rounds,
            "tolerance": options.tolerance,
            "rows": [*_mixtures(options), *(_codes(options) if "codes" in options.case else [])],
        }
    name = f"em_{options.threads}_thread{'s' * (options.threads > 1)}"
    folder = Path(__file__).parent / "results"
    if options.add and (folder / f"{name}.json").is_file():
        fresh = {row["what"] for row in results["rows"]}
        older = json.loads((folder / f"{name}.json").read_text())["rows"]
        results["rows"] = [*(row for row in older if row["what"] not in fresh), *results["rows"]]
    print(_table(results), end="")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(_table(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.em", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads for both")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="a gain of EM in nats per datum that ends it")
    parser.add_argument("--iterations", type=int, default=500, help="most iterations, of either")
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], help="what is fitted")
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    parser.add_argument("--root", default=os.environ.get("LOWERBOUND_DATA"), help="folder with MNIST")
    return parser.parse_args()


def _mixtures(options: argparse.Namespace) -> list[dict[str, Any]]:
    import numpy as np
    import torch
    from sklearn.mixture import GaussianMixture as Sklearn

    from inference.em import EM, EMSettings
    from inference.reduction import principal
    from models.gmm import GaussianMixture
    from models.kmeans import KMeans

    dataset = principal(_images(options.root), 50)
    rows = []
    for dtype in (getattr(torch, name) for name in options.case if name != "codes"):
        x = torch.cat([torch.as_tensor(dataset.splits[split]) for split in ("train", "valid")]).to(dtype)
        model, codes = GaussianMixture((50,), 64).to(dtype), KMeans((50,), 64).to(dtype)
        codes.initialize(x, torch.Generator().manual_seed(0))
        codes.lloyd(x, 10)
        model.m_step(model.statistics(x, torch.nn.functional.one_hot(codes.encode(x), 64).to(dtype)))
        start = {name: value.clone() for name, value in model.state_dict().items()}
        inverse = np.linalg.inv(model.covariances.detach().double().numpy())
        words = {"weights_init": model.weights, "means_init": model.loc}
        init = {name: value.detach().double().numpy().astype(x.numpy().dtype) for name, value in words.items()}
        theirs = Sklearn(64, **init, precisions_init=inverse.astype(x.numpy().dtype), reg_covar=0, init_params="random",
                         tol=options.tolerance, random_state=0)  # fmt: skip

        def ours(most: int, model: Any = model, x: Any = x, start: Any = start) -> tuple[float, int]:
            model.load_state_dict(start)
            em = EM(model, x, EMSettings(iterations=most, restarts=0, tolerance=0))
            before, end, count = -math.inf, em.step()[0].log_evidence or 0.0, 1
            while not em.finished and end - before >= options.tolerance:
                before, end, count = end, em.step()[0].log_evidence or 0.0, count + 1
            return end, count

        def sklearns(most: int, theirs: Any = theirs, x: Any = x) -> tuple[float, int]:
            theirs.set_params(max_iter=most).fit(x.numpy())
            return float(theirs.lower_bound_), int(theirs.n_iter_)

        rows.append(_measured(f"mixture, {str(dtype)[6:]}", ours, sklearns, options))
    return rows


def _codes(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from sklearn.cluster import KMeans as Sklearn

    from inference.em import EMSettings, fit
    from models.kmeans import KMeans

    dataset = _images(options.root)
    x = torch.cat([torch.as_tensor(dataset.splits[split]) for split in ("train", "valid")]).flatten(1).float() / 255
    model = KMeans((784,), 64)
    model.initialize(x, torch.Generator().manual_seed(0))
    start = model.codebook.detach().clone()
    theirs = Sklearn(64, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd")

    def ours(most: int) -> tuple[float, int]:
        with torch.no_grad():
            model.codebook.copy_(start)
        result = fit(model, x, EMSettings(iterations=most, restarts=0, tolerance=0))
        return -result.free_energy, result.iterations

    def sklearns(most: int) -> tuple[float, int]:
        theirs.set_params(max_iter=most).fit(x.numpy())
        return float(theirs.inertia_) / len(x), int(theirs.n_iter_)

    return [_measured("K-means, float32", ours, sklearns, options)]


def _images(root: str | None) -> Any:
    from inference.datasets import mnist

    return mnist(root, binarization="none")


Fit = Callable[[int], tuple[float, int]]  # of most iterations, to where it ended and how many it took


def _measured(name: str, ours: Fit, theirs: Fit, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole fits, by the clock and of processor time, and where both ended."""
    contenders = {"ours": ours, "scikit-learn": theirs}
    for fit in contenders.values():
        fit(2)  # warmed up
    row: dict[str, Any] = {"what": name, "ended": {}}
    row |= {by: {who: [] for who in contenders} for by in ("clock", "processor")}
    for turn in range(options.rounds):
        for who in list(contenders)[:: 1 if turn % 2 else -1]:
            began, used = time.perf_counter(), time.process_time()
            row["ended"][who] = contenders[who](options.iterations)
            row["clock"][who].append(time.perf_counter() - began)
            row["processor"][who].append(time.process_time() - used)
            print(f"{name:<18} {who:<13} {row['ended'][who][1]:4} iterations, {row['clock'][who][-1]:8.2f} s, end "
                  f"{row['ended'][who][0]:.6f}", flush=True)  # fmt: skip
    return row


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['machine']}, load {results['load']:.1f}; {results['threads']} thread(s); {results['versions']}. "
        f"Whole fits from one start to a gain of {results['tolerance']:g} nats per datum, K-means until it stands "
        f"still; seconds of processor time, median of {results['rounds']} interleaved rounds; the end is log p(x), or "
        "the inertia, per datum.",
        "",
        "| | ours | scikit-learn | ratio | by the clock | per iteration | iterations | end, ours | scikit-learn |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        middle = {who: statistics.median(times) for who, times in row["processor"].items()}
        ratios = [
            statistics.median(a / b for a, b in zip(row[by]["ours"], row[by]["scikit-learn"], strict=True))
            for by in ("processor", "clock")
        ]
        (end, count), (other, others) = (row["ended"][who] for who in ("ours", "scikit-learn"))
        cells = [f"{middle['ours']:.2f}", f"{middle['scikit-learn']:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells.append(f"{ratios[0] * others / count:.2f}")
        lines.append(f"| {row['what']} | {' | '.join(cells)} | {count}, {others} | {end:.6f} | {other:.6f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
