"""Pyro's own ELBOs, which refuse where Pyro would warn and go on."""

from typing import Any

import pyro.infer
from pyro.infer import config_enumerate
from pyro.infer.util import is_validation_enabled

from inference.closed_form import has_closed_form, is_relaxed
from inference.particles import sites_of
from inference.structure import Program, Site, StructureError, check_pairing, innermost


class _Checked(pyro.infer.ELBO):
    """Looks at the sites of both programs first, where arguments are checked: as a rule in the first step alone."""

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        if is_validation_enabled():
            q_sites, p_sites = sites_of(model, guide, *args, **kwargs)
            self.check(q_sites, {n: s for n, s in p_sites.items() if not s["is_observed"]}, p_sites)
        return super()._get_traces(model, guide, args, kwargs)

    def check(self, q_sites: dict[str, Site], latents: dict[str, Site], p_sites: dict[str, Site]) -> None:
        """Refuse a pair of programs that this bound is not about.

        Raises:
            StructureError: with the reason, and what would do.
        """
        check_pairing(q_sites, latents, {n: s for n, s in p_sites.items() if n not in latents})


class _Sampled(_Checked):
    """Takes the KL from the draws."""

    def check(self, q_sites: dict[str, Site], latents: dict[str, Site], p_sites: dict[str, Site]) -> None:
        super().check(q_sites, latents, p_sites)
        if relaxed := [name for name, site in q_sites.items() if is_relaxed(site["fn"])]:
            raise StructureError(
                f"this objective takes the KL from the draws, and those of {relaxed} are relaxed, whose mean of "
                "log q - log p is no KL, and tends to zero as the temperature rises; use objective=elbo, whose KL is "
                "that of the discrete distributions"
            )


class Trace(_Sampled, pyro.infer.Trace_ELBO):
    """``Trace_ELBO``."""


class TraceGraph(_Sampled, pyro.infer.TraceGraph_ELBO):
    """``TraceGraph_ELBO``."""


class TraceMeanField(_Checked, pyro.infer.TraceMeanField_ELBO):
    """``TraceMeanField_ELBO``."""

    def check(self, q_sites: dict[str, Site], latents: dict[str, Site], p_sites: dict[str, Site]) -> None:
        super().check(q_sites, latents, p_sites)
        if sites := [name for name, site in q_sites.items() if not site["fn"].has_rsample]:
            raise StructureError(
                f"objective=trace_mean_field needs reparameterized sites, and the guide's {sites} are not; use "
                "objective=trace_graph or trace_elbo, or objective=elbo with a gradient for such draws"
            )
        if [name for name in q_sites if name in latents] != list(latents):
            raise StructureError(
                "objective=trace_mean_field sums divergences of sites given those before them, so the guide has to "
                "sample its latents in the model's order; use objective=trace_elbo"
            )
        for name in latents:
            q, p = q_sites[name]["fn"], latents[name]["fn"]
            if is_relaxed(q) and not has_closed_form(q, p):
                raise StructureError(
                    f"objective=trace_mean_field would take the KL of site '{name}' from relaxed draws, which tell "
                    "nothing of it, for it has no closed form; use objective=elbo"
                )


class TraceEnum(_Checked, pyro.infer.TraceEnum_ELBO):
    """``TraceEnum_ELBO`` that sums out every discrete latent of the model that the guide leaves to it.

    What the guide draws or enumerates is as with Pyro's own.
    """

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return super()._get_traces(config_enumerate(model, default="parallel"), guide, args, kwargs)

    def check(self, q_sites: dict[str, Site], latents: dict[str, Site], p_sites: dict[str, Site]) -> None:
        summed = [n for n, s in latents.items() if n not in q_sites and innermost(s["fn"]).has_enumerate_support]
        if not summed and not any(site["infer"].get("enumerate") for site in q_sites.values()):
            raise StructureError(
                "objective=trace_enum sums over discrete latents, and neither program has any that it may; use "
                "objective=trace_elbo, or guide=enumerated with discrete latents"
            )
