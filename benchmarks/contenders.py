"""The same models, trained in different ways.

Each contender takes one optimization step, by Adam at 1e-3, for each batch that it is given.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

RATE, RUNS, MANY_RUNS, STEPS_PER_CALL = 1e-3, 8, 32, 4
CASES = {
    "vae": "variational autoencoder",
    "iaf": "two inverse autoregressive maps in the guide",
    "iwae": "importance-weighted, 50 particles",
    "vamp": "VampPrior, 500 pseudo-inputs",
    "gmm": "mixture of 10 normals, enumerated",
    "vq": "VQ-VAE, 16 places of 64 codes",
}
Steps = Callable[[Sequence[Tensor]], Any]

HAND, HAND_COMPILED = "PyTorch by hand, fused Adam", "PyTorch by hand, torch.compile"
HAND_RECORDED = "PyTorch by hand, CUDA graph"
STOCK, CHECKED = "Pyro SVI", "Pyro SVI, validation on (its default)"
JIT = "Pyro SVI, its Jit ELBO"
EAGER, COMPILED = "ours, eager", "ours, compiled"
SEVERAL = f"ours, compiled, {STEPS_PER_CALL} steps per call"
TOGETHER, MANY_TOGETHER = (f"ours, {runs} runs in one step, for each" for runs in (RUNS, MANY_RUNS))
DROP_IN = "ours, compiled, Pyro's program and ELBO"
UPDATE, SCAN = "NumPyro SVI, jitted update", "NumPyro SVI, lax.scan"
PYTHAE = "pythae BaseTrainer"
RUNS_IN = {TOGETHER: RUNS, MANY_TOGETHER: MANY_RUNS}
OURS = (EAGER, COMPILED, DROP_IN, SEVERAL, TOGETHER, MANY_TOGETHER)
ALL = (HAND, HAND_COMPILED, HAND_RECORDED, STOCK, CHECKED, JIT, *OURS, UPDATE, SCAN, PYTHAE)
ON_GPU, ON_CPU = (HAND_RECORDED, MANY_TOGETHER), (PYTHAE,)  # and nowhere else


class Missing(Exception):
    """A contender has no place in a row; the message says why."""


def contenders_on(device: str) -> list[str]:
    """Those that there are on a device, cpu or cuda."""
    return [name for name in ALL if name not in (ON_GPU if device == "cpu" else ON_CPU)]


def contender(name: str, case: str, batch_size: int, device: str = "cpu") -> Steps:
    """The steps of a contender for a case.

    Raises:
        Missing: it cannot express the case, or is not installed.
    """
    made: dict[str, Callable[[], Steps]] = {
        HAND: partial(_by_hand, case, device),
        HAND_COMPILED: partial(_by_hand, case, device, compile=True),
        HAND_RECORDED: partial(_recorded_by_hand, case, device, batch_size),
        STOCK: partial(_stock, case, device),
        CHECKED: partial(_stock, case, device, validate=True),
        JIT: partial(_stock, case, device, jit=True),
        DROP_IN: partial(_stock, case, device, compiled=True),
        EAGER: partial(_ours, case, device, "eager"),
        COMPILED: partial(_ours, case, device, "compiled"),
        SEVERAL: partial(_ours, case, device, "several", batch_size),
        TOGETHER: partial(_together, case, device, batch_size, RUNS),
        MANY_TOGETHER: partial(_together, case, device, batch_size, MANY_RUNS),
        UPDATE: partial(_numpyro, case, device, scan=False),
        SCAN: partial(_numpyro, case, device, scan=True),
        PYTHAE: partial(_pythae, case),
    }
    return made[name]()


def _by_hand(case: str, device: str, compile: bool = False) -> Steps:
    from benchmarks.by_hand import MODELS

    module = MODELS[case]().to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=True)
    forward = torch.compile(module) if compile else module

    def steps(batches: Sequence[Tensor]) -> None:
        for x in batches:
            forward(x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def _recorded_by_hand(case: str, device: str, batch_size: int) -> Steps:
    """Loss, gradient and update in one CUDA graph, as PyTorch's documentation has it."""
    from benchmarks.by_hand import MODELS, PIXELS

    module, x = MODELS[case]().to(device), torch.zeros(batch_size, PIXELS, device=device)
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE, fused=True, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(x).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()

    def steps(batches: Sequence[Tensor]) -> None:
        for batch in batches:
            x.copy_(batch)
            graph.replay()

    return steps


def _stock(case: str, device: str, jit: bool = False, validate: bool = False, compiled: bool = False) -> Steps:
    """Pyro's SVI, or in its place ours, on Pyro's program, ELBO and optimizer."""
    import pyro
    import pyro.infer
    import pyro.optim

    from benchmarks.stock import PROGRAMS, elbo
    from inference.compiled import CompiledSVI

    if (loss := elbo(case, jit)) is None:
        raise Missing("Pyro's RenyiELBO has no Jit version")
    program, own_store = PROGRAMS[case]().to(device), type(pyro.get_param_store())()
    kind = CompiledSVI if compiled else pyro.infer.SVI
    svi = kind(program.model, program.guide, pyro.optim.Adam({"lr": RATE}), loss)
    if compiled and svi.why_eager:
        raise Missing(f"runs eagerly: {svi.why_eager}")

    def steps(batches: Sequence[Tensor]) -> None:
        # a store of one's own, for others may train parameters of the same names; as Pyro comes, not as set up here
        with (
            _param_store(own_store),
            pyro.settings.context(module_local_params=False),
            pyro.validation_enabled(validate),
        ):
            for x in batches:
                svi.step(x)
        if compiled and svi.why_eager:
            raise Missing(f"runs eagerly: {svi.why_eager}")

    return steps


class _param_store:
    """Pyro's global store of parameters replaced by another."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: Any) -> None:
        self._swap()

    def _swap(self) -> None:
        import pyro

        current = pyro.get_param_store()
        current.__dict__, self.store.__dict__ = self.store.__dict__, current.__dict__


def _parts(case: str, device: str, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    from benchmarks.parts import PARTS
    from inference.engine import SharedOptimizer

    torch.manual_seed(seed)
    model, guide, objective = PARTS[case]()
    model, guide = model.to(device), guide.to(device)
    parameters = dict.fromkeys([*model.parameters(), *guide.parameters()])
    return model, guide, SharedOptimizer(parameters, partial(torch.optim.Adam, fused=True), RATE), objective


def _ours(case: str, device: str, engine: str, batch_size: int = 0) -> Steps:
    from inference.compiled import CompiledSVI
    from inference.engine import SVI
    from inference.particles import validation

    if engine == "several" and device == "cpu" and batch_size * (50 if case == "iwae" else 1) >= 1000:
        raise Missing("left out: what one call saves is a thousandth of a step of this size")
    parts = _parts(case, device)
    at_once = STEPS_PER_CALL if engine == "several" else 1
    svi = SVI(*parts) if engine == "eager" else CompiledSVI(*parts, steps_per_call=at_once)

    def steps(batches: Sequence[Tensor]) -> None:
        with validation(False):
            if engine == "several":
                svi.steps(batches)
            else:
                for x in batches:
                    svi.step(x)
        if why := getattr(svi, "why_eager", None):
            raise Missing(f"runs eagerly: {why}")

    return steps


def _together(case: str, device: str, batch_size: int, count: int) -> Steps:
    """Several runs in one compiled step; a step of all of them for each batch."""
    from inference.compiled import CompiledSVI
    from inference.particles import validation
    from inference.vectorized import VectorizedSVI

    if device == "cpu" and batch_size * (50 if case == "iwae" else 1) >= 1000:
        raise Missing(f"left out: on a CPU {count} such runs take {count} compiled steps, whose time is above")
    runs = [CompiledSVI(*_parts(case, device, seed)) for seed in range(count)]
    svi = VectorizedSVI(runs, [torch.Generator(device).manual_seed(seed) for seed in range(count)])

    def steps(batches: Sequence[Tensor]) -> None:
        with validation(False):
            for x in batches:
                svi.step([x] * count)
        if svi.why_eager:
            raise Missing(f"runs step one after another: {svi.why_eager}")

    return steps


def _numpyro(case: str, device: str, scan: bool) -> Steps:
    if not importlib.util.find_spec("numpyro"):
        raise Missing("not installed")
    if case == "gmm" and not importlib.util.find_spec("funsor"):
        raise Missing("its enumeration needs funsor, which is not installed")
    import jax

    from benchmarks.in_numpyro import train

    if not any(d.platform == ("gpu" if device == "cuda" else "cpu") for d in jax.devices()):
        raise Missing(f"this JAX knows no {device} device")
    return train(case, scan)


def _pythae(case: str) -> Steps:
    if not importlib.util.find_spec("pythae"):
        raise Missing("not installed")
    if case != "vae":
        raise Missing("only its plain variational autoencoder has the same arithmetic")
    from benchmarks.in_pythae import train

    return train()
