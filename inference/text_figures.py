"""Pictures of lines of text: reconstructions beside their originals, samples, what lies between two codes."""

from collections.abc import Sequence

from inference.canvas import BLUE, FAINT, HAIRLINE, INK, MUTED, WIDTH, Sheet, panel, sheet
from inference.data_figures import Picture

ROW = 34  # pixels from line to line
LONGEST = 88  # characters that fit across a page


def line_reconstructions(originals: Sequence[str], reconstructions: Sequence[str]) -> Picture:
    """Pairs of lines, each original above what its code is read as."""
    pairs = list(zip(originals, reconstructions, strict=True))[:12]
    rows = []
    for original, reconstruction in pairs:
        rows += [("original", original, INK), ("reconstruction", reconstruction, BLUE)]
    caption = (
        "Held-out lines, each with its reconstruction directly below it: one code z is drawn from q(z|x), and of the "
        "tokens that may follow the likeliest is taken each time. If all reconstructions are one and the same line, "
        "the posterior has collapsed, and the codes say nothing."
    )
    return Picture("Reconstructions", caption, _print(rows, group=2))


def line_samples(samples: Sequence[str]) -> Picture:
    """Draws of the model, one under the other."""
    caption = (
        "What the model makes up: lines drawn token by token, each for a code z of its own drawn from the prior; no "
        "datum, no guide is involved."
    )
    return Picture("Samples from the prior", caption, _print([("", line, INK) for line in samples[:20]], group=20))


def line_interpolations(between: Sequence[Sequence[str]]) -> Picture:
    """For each pair of data the lines that codes from the first's to the second's are read as."""
    rows = []
    for lines in between[:3]:
        last = len(lines) - 1
        names = ["first" if place == 0 else "second" if place == last else "" for place in range(len(lines))]
        rows += [(name, line, BLUE if name else INK) for name, line in zip(names, lines, strict=True)]
    caption = (
        "From the code of one held-out line to that of another in equal steps, each code read by taking the likeliest "
        "token each time. Lines that change by and by show a code that orders text; one line throughout, codes that "
        "are not listened to."
    )
    return Picture("Between two lines", caption, _print(rows, group=len(between[0])))


def _print(rows: Sequence[tuple[str, str, str]], group: int) -> Sheet:
    """Rows of (name, text, colour); a hairline between groups of so many."""
    height = ROW * len(rows) + 16 * (-(-len(rows) // group))
    figure = sheet(WIDTH, height + 24)
    axes = panel(figure, 24, 12, WIDTH - 48, height, spines="")
    axes.set(xlim=(0, 1), ylim=(height, 0), xticks=[], yticks=[])
    for place, (name, text, tint) in enumerate(rows):
        y = ROW * (place + 0.5) + 16 * (place // group)
        if place and place % group == 0:
            axes.axhline(y - ROW / 2 - 8, color=HAIRLINE, linewidth=0.6)
        axes.text(0, y, name, color=MUTED, fontsize=8.5, va="center")
        shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        empty = not shown.strip()
        axes.text(0.1, y, "(an empty line)" if empty else shown, color=FAINT if empty else tint, fontsize=10.5,
                  va="center", parse_math=False)  # fmt: skip
    return figure
