"""What objectives and diagnostics need of the sites of Pyro programs, checked."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

Program = Callable[..., Any]
Site = dict[str, Any]


class StructureError(ValueError):
    """A Pyro program lacks the structure that an objective or a diagnostic needs; the message says what would do."""


def check_pairing(q_sites: dict[str, Site], latents: dict[str, Site], observed: dict[str, Site]) -> None:
    if not observed:
        raise StructureError("the model observes nothing: give one sample site obs=x")
    if enumerated := [n for n, s in {**q_sites, **latents}.items() if s["infer"].get("enumerate")]:
        raise StructureError(f"sites {enumerated} are enumerated: use pyro.infer.TraceEnum_ELBO (objective=trace_enum)")
    if missing := [name for name in latents if name not in q_sites]:
        raise StructureError(f"the guide does not sample the model's latent sites {missing}")
    extra = [n for n, s in q_sites.items() if n not in latents and not s["infer"].get("is_auxiliary")]
    if extra:
        raise StructureError(f"the model has no latent sites {extra} that the guide samples")


def check_paths(q_sites: dict[str, Site], detached: bool, rescaled: bool) -> None:
    """Refuse draws by a relaxation where a gradient is about the distribution that scores them.

    Args:
        q_sites: the guide's.
        detached: the score of q alone is wanted, or its absence: right where draws are distributed as it says.
        rescaled: the path derivative is to stand for a score: right where the draws are reparameterized exactly.
    """
    relaxed = {name: q for name, site in q_sites.items() if hasattr(q := innermost(site["fn"]), "hard")}
    if soft := [name for name, q in relaxed.items() if detached and not q.hard]:
        raise StructureError(
            f"the guide relaxes the draws of {soft}, so that they are not distributed as log q says, and their score "
            "is not the gradient of the bound; use gradient=reparameterized, or guide=straight_through, bits or onehot"
        )
    if relaxed and rescaled:
        raise StructureError(
            f"the path through the draws of {list(relaxed)} is that of a relaxation, which does not stand for the "
            "score that this gradient replaces by it; use gradient=reparameterized"
        )


def expect_separate(log_joint: Tensor, log_q: Tensor, who: str, instead: str, programs: Iterable[Program] = ()) -> None:
    """Refuse a pair of programs with a parameter in common, where each of the two follows a target of its own.

    Args:
        log_joint: log p(x, z) of draws without gradient; whatever else it depends on counts.
        log_q: log q(z|x) of the same draws.
        who: has the two targets.
        instead: what would do.
        programs: where the names of parameters may be found.
    """
    for_model, for_guide = _leaves(log_joint), _leaves(log_q)
    if not (shared := for_model.keys() & for_guide.keys()):
        return
    owners = [getattr(program, "__self__", program) for program in programs]
    named = [pair for owner in owners if isinstance(owner, nn.Module) for pair in owner.named_parameters()]
    names = dict.fromkeys(name for name, parameter in named if id(parameter) in shared)
    which = f" ({', '.join(list(names)[:3])}, ...)" if names else ""
    raise StructureError(
        f"{who} has one target for the model and another for the guide, and both depend on the same parameters{which}, "
        f"which would follow neither; {instead}, or use a guide and a prior that have their parameters to themselves"
    )


def _leaves(tensor: Tensor) -> dict[int, Tensor]:
    """The tensors that a gradient would reach, by identity."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        pending.extend(following for following, _ in node.next_functions)
    return found


def innermost(q: Any) -> Any:
    while hasattr(q, "base_dist"):
        q = q.base_dist
    return q


def data_plate(*programs: dict[str, Site]) -> tuple[int, float]:
    """Size and subsampling scale of the plate over the data, after checking that nothing else scales any site."""
    plates = {_data_plate_of(site) for sites in programs for site in sites.values()}
    if len(plates) > 1:
        raise StructureError(f"sites disagree about the plate over the data: (size, scale) is any of {sorted(plates)}")
    return plates.pop()


def _data_plate_of(site: Site) -> tuple[int, float]:
    frames = [frame for frame in site["cond_indep_stack"] if frame.dim == -1]
    if not frames:
        raise StructureError(
            f"site '{site['name']}' is outside the plate over the data (dim -1); a bound per datum needs local sites. "
            "For global latent variables use pyro.infer.Trace_ELBO"
        )
    size, scale = frames[0].size, site["scale"]
    subsampling = (frames[0].full_size or size) / size
    if isinstance(scale, Tensor) or abs(scale / subsampling - 1) > 1e-9:
        raise StructureError(
            f"site '{site['name']}' is scaled by poutine.scale or by a subsampled plate within the data; a scale "
            "inside the average over particles gives no bound. Temper the objective instead"
        )
    return size, subsampling
