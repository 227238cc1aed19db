"""Where fits that started together were on their way to: where EM comes to from the end of each."""

from collections.abc import Sequence
from string import ascii_uppercase

from inference.studies.traces import Trace

SAME = 2e-3  # nats per datum: what is nearer than this to the next one is the same


def destinations(traces: Sequence[Trace]) -> dict[str, str]:
    """For each fit a letter, A for the highest log p(x) that EM comes to from any end, the same for the same place.

    Fits from which EM degenerates have none.
    """
    ordered = sorted((t for t in traces if t.optimum is not None), key=lambda t: -(t.optimum or 0.0))
    letters: dict[str, str] = {}
    last, place = None, -1
    for trace in ordered:
        assert trace.optimum is not None
        place += last is None or last - trace.optimum > SAME
        letters[trace.way], last = ascii_uppercase[min(place, 25)], trace.optimum
    return letters


def told(traces: Sequence[Trace]) -> str:
    """The same in words; EM's own comes first among the traces."""
    letters, em = destinations(traces), traces[0]
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(letters.get(trace.way, ""), []).append(trace)
    failed = groups.pop("", [])
    parts = []
    for letter, some in sorted(groups.items()):
        value = max(t.optimum for t in some if t.optimum is not None)
        parts.append(f"to {letter} ({value:.4f}) from {_listed([_stood(t) for t in some])}")
    text = (
        "To tell another optimum from an unfinished climb, EM goes on from the end of each fit; in brackets is "
        f"how far below that fit was. It comes {'; '.join(parts)}."
    )
    if failed:
        text += (
            f" From {_listed([t.way for t in failed])} it comes to a singular component, where log p(x) is unbounded."
        )
    if any(letter != letters.get(em.way) for letter in groups):
        text += (
            " What starts together need not end together: log p(x) has several stationary points, and the noise of "
            "batches, longer steps or a q that is not the posterior lead across from the slope of one to another's."
        )
    return text


def _stood(trace: Trace) -> str:
    assert trace.optimum is not None
    return f"{trace.way} ({max(0.0, trace.optimum - trace.points[-1].log_p):.4f})"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
