"""What other people's exceptions mean, and why data do not fit a likelihood."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference.data import Dataset


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, on the host or on a device."""
    words = str(error)
    return isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words


def one_line(error: BaseException) -> str:
    """The message of an error as one line of no more than 300 characters."""
    words = (
        " ".join(str(error).split()).partition(" Trace Shapes:")[0] or type(error).__name__
    )  # Pyro's table of shapes
    return words if len(words) <= 300 else words[:297] + "..."


def why_not(dataset: "Dataset", supports: str, own: bool) -> str | None:
    """Why the number of a likelihood would not be a log-likelihood of the data; ``None`` where it would.

    Args:
        dataset: the data.
        supports: what the likelihood scores.
        own: whether it is the model's own, so that no word chooses another.
    """
    if (dataset.kind == "tokens") != (supports == "tokens"):
        return _not_tokens(dataset, own)
    if dataset.bits:
        return _not_bits(dataset, supports, own)
    if dataset.kind == "grey":
        return _not_grey(dataset, supports, own)
    return _not_real(supports, own) if dataset.kind == "real" else None


def _not_tokens(dataset: "Dataset", own: bool) -> str:
    if dataset.kind == "tokens":
        instead = (
            "leave out model=... and choose encoder=lstm with likelihood=lstm" if own else "choose likelihood=lstm"
        )
        return f"its observations are lines of tokens; {instead} or transformer"
    return (
        "this likelihood scores lines of tokens, and these are none; choose data=shakespeare, data=lines, or "
        f"likelihood={dataset.default_likelihood}"
    )


def _not_bits(dataset: "Dataset", supports: str, own: bool) -> str | None:
    if supports != "real":
        return None
    greys = dataset.binarization != "none"
    remedy = "likelihood=bernoulli" + (" or data.binarization=none, if grey levels were meant" if greys else "")
    if own:
        bits = "model=tabular or model=latent_class"
        remedy = f"data.binarization=none for grey levels, or {bits} for bits" if greys else bits
    return (
        "its observations are bits, and a density over them has no upper bound (it grows without limit on the points "
        f"0 and 1), so its bound says nothing; choose {remedy}"
    )


def _not_grey(dataset: "Dataset", supports: str, own: bool) -> str | None:
    if supports != "binary":
        return None
    other = (
        "likelihood=logistic or categorical for the grey levels, or likelihood=learned_gaussian for dequantized greys"
    )
    if own:
        other = "model=latent_class for the grey levels, or model=gmm for dequantized greys"
    return (
        f"grey pixels (0 to {(dataset.levels or 2) - 1}) under a Bernoulli are refused: strictly between 0 and 1 its "
        "formula x log p + (1 - x) log(1 - p) is not normalized, so it is no likelihood and gives no bound "
        "(Loaiza-Ganem and Cunningham 2019); choose data.binarization=dynamic or static where the data set offers it, "
        f"{other}"
    )


def _not_real(supports: str, own: bool) -> str | None:
    if supports == "real":
        return None
    if not own:
        return "its numbers are real, and this likelihood scores whole numbers; choose likelihood=learned_gaussian"
    whole = "zeros and ones" if supports == "binary" else "whole numbers"
    return (
        f"its numbers are real, and this model scores {whole}; choose a model of real numbers, such as model=gmm or "
        f"model=kmeans, or, where a file holds {whole} as floats, save them as uint8"
    )
