"""The page of a run: settings, numbers with their meanings, pictures. One file, nothing fetched, nothing executed."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from inference.checkpoint import write_atomically
from inference.decomposition import decompose
from inference.figures import Figure

# One line for each key of summary.json, in the order of the page.
MEANINGS = {
    "test/nll": "−log p(x), estimated by importance sampling with the guide as proposal; lower is better. "
    "On average it errs upwards. None where each datum has a point, which bounds nothing.",
    "test/nll_stderr": "Standard error of the line above, from the spread over held-out data.",
    "test/nll_exact": "−log p(x) in closed form, where the model has it: what the estimate is to be held against.",
    "test/nll_particles": "Importance samples for each datum behind the estimate of log p(x); with 1, it "
    "is the bound itself: a guide with one value for each datum has no more to say.",
    "test/nll_per_token": "The same code length for each token of text, the end of a line among them, in nats.",
    "test/perplexity": "exp of the line above: as if each token were one of so many that are equally likely.",
    "test/tokens": "Tokens of the held-out lines.",
    "test/bits_per_dim": "The same code length in bits for each observed dimension; of text, for each token.",
    "test/elbo": "The evidence lower bound on log p(x): reconstruction minus KL; higher is better.",
    "test/reconstruction": "Mean of log p(x|z) under the guide: how well a datum is predicted from its own code.",
    "test/kl": "KL(q(z|x) ‖ p(z)): what the code of a datum costs. At zero the posterior has collapsed onto the prior.",
    "test/mutual_information": "The part of the KL that tells data apart: what z knows about x under the guide.",
    "test/mutual_information_upper": "The same, estimated so that it is high on average where the split of the KL was "
    "taken on a part of the data, as the line above is then low.",
    "test/marginal_kl": "The rest of the KL: how far the codes of all data together are from the prior. None where "
    "each datum has a point: it is infinite.",
    "test/active_units": "Latent dimensions, or one-hot vectors, whose posterior mean moves from datum to datum.",
    "test/khat_median": "Median tail index of the importance weights. Above 0.7 the estimate of log p(x) is not to be "
    "trusted; below it that is no proof.",
    "test/code_perplexity": "How many codes of each codebook are in use over all held-out data: exp of the entropy of "
    "their frequencies; at most the size of the codebook.",
    "test/codes_used": "Codes of each codebook that occur at all in held-out data.",
    "test/code_bits_per_image": "Bits for the codes of a datum, by how often each occurs.",
    "test/code_prior_bits_per_image": "Bits for the codes of a datum under their prior, less what drawn codes give "
    "back: the KL in bits.",
    "test/code_fixed_bits_per_image": "Bits for the codes of a datum if all are equally likely.",
    "test/data": "Held-out data behind these numbers.",
    "test/mutual_information_estimator": "How the information was estimated; the marginal KL is the rest of the KL.",
    "test/surgery_data": "Held-out data behind the split of the KL; the information in a code is at most the logarithm "
    "of their number.",
    "test/kl_estimator": "Whether the KL is in closed form or a mean over draws.",
    "test/kl_per_dimension": "The KL of each latent dimension, drawn below.",
    "train/elbo": "The bound on as many training data: how far it is above test/elbo is what was learnt by heart.",
    "train/steps": "Optimization steps taken.",
    "train/epochs": "Passes over the training data.",
    "train/seconds": "Wall-clock time of the training.",
    "train/steps_per_second": "Mean speed of the training.",
    "train/converged": "Whether EM met its tolerance, in the start that was kept.",
    "train/bounds": "The bound at the end of each start, in nats per datum; none where it failed.",
    "train/inner_steps": "Steps of the encoder alone, between those of the decoder.",
    "train/aggressive_steps": "Steps of the decoder before each of which the encoder was let catch up.",
    "train/parameters": "Numbers that the training adjusts, in model and guide together.",
    "data": "The data set.",
    "binarization": "How grey values became zeros and ones.",
    "model": "The generative program p(x, z).",
    "prior": "p(z), where codes come from before any datum is seen.",
    "tokens": "The prior over grids of code numbers: uniform, or learnt along with the codes.",
    "likelihood": "p(x|z), what a code says about the datum.",
    "guide": "The variational family q(z|x).",
    "objective": "The bound that was maximized.",
    "inference": "How it was maximized: svi by stochastic gradients, aggressive with an encoder that catches up first, "
    "em by closed-form half steps.",
    "encoder": "The network that reads the datum.",
    "decoder": "The network that reads the code.",
    "optimizer": "How parameters follow the gradient.",
    "data_description": "As at the head of this page.",
    "seed": "Of all random numbers of the run: the same seed gives the same numbers.",
    "device": "Where it ran.",
    "versions": "Of the software it ran on.",
}
LONGEST_LIST = 6  # entries of a list in a table
SECTIONS = {
    "Held-out data": "test/",
    "Training": "train/",
    "Settings": "",
}


def write_report(
    run_dir: Path, summary: Mapping[str, Any], config_yaml: str, data_description: str, figures: Sequence[Figure]
) -> Path:
    """Write ``run_dir/report.html`` in one move, so that a reader never finds half a page.

    The same arguments give the same bytes.

    Args:
        run_dir: the run's directory; made if missing.
        summary: flat keys of ``summary.json``; keys without a known meaning are shown without one.
        config_yaml: the configuration as text.
        data_description: a sentence or two on the data.
        figures: pictures, embedded in this order.

    Returns:
        the path of the page.
    """
    page = render(
        "report.html.j2",
        title=_title(summary),
        parts=[(name, summary[name]) for name in ("guide", "prior", "likelihood", "objective") if summary.get(name)],
        data_description=data_description,
        decomposition=decompose(summary),
        tables=_tables(summary),
        figures=[(figure, *embedded(figure.path)) for figure in figures],
        config_yaml=config_yaml,
    )
    path = Path(run_dir) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _title(summary: Mapping[str, Any]) -> str:
    names = [str(summary[key]) for key in ("model", "data") if summary.get(key)]
    return " on ".join(names) or "A run"


def _tables(summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Sections of (key, value, meaning); a key belongs to the first section whose prefix it has, known keys first."""
    places = {key: place for place, key in enumerate(MEANINGS)}
    left = sorted(summary, key=lambda key: (places.get(key, len(places)), key))
    tables = []
    for section, prefix in SECTIONS.items():
        rows = [(key, format_value(summary[key]), MEANINGS.get(key, "")) for key in left if key.startswith(prefix)]
        left = [key for key in left if not key.startswith(prefix)]
        if rows:
            tables.append((section, rows))
    return tables


def format_value(value: Any) -> str:
    """A value as a reader wants it: a dash for ``None``, thin spaces between thousands, a real minus sign."""
    if value is None:
        return "—"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        shown = [format_value(entry) for entry in value[:LONGEST_LIST]]
        return ", ".join(shown) + (f", … ({len(value)} in all)" if len(value) > LONGEST_LIST else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return (f"{value:,}" if abs(value) >= 10_000 else f"{value}").replace(",", "\u2009").replace("-", "−")
    text = f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return text.replace(",", "\u2009").replace("-", "−")


def render(template: str, **values: Any) -> str:
    """A page from one of the templates beside this file; everything filled in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = format_value
    return environment.get_template(template).render(**values)


def embedded(path: Path) -> tuple[str, int, int]:
    """A PNG as a data address, with the width and height that it takes on the page: two pixels make one of CSS."""
    content = Path(path).read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is not a PNG, the only kind of picture that a report embeds")
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))  # IHDR
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii"), width // 2, height // 2
