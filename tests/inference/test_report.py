"""Pictures that show what they say, and a page that a browser opens without a complaint."""

import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import norm

from inference import canvas
from inference.data_figures import latent_grid
from inference.figures import Figure, Gallery, draw
from inference.report import format_value, write_report
from tests.browser import open_page

METRICS = [
    *({"step": step, "epoch": step / 10, "seconds": 0.1, "train/bound": -20 - 80 / step} for step in range(1, 60)),
    *(
        {"step": step, "valid/elbo": -25.0 - 1 / step, "valid/reconstruction": -21.0 - 1 / step, "valid/kl": 4.0}
        for step in range(10, 60, 10)
    ),
]
SUMMARY = {
    "test/elbo": -25.3,
    "test/reconstruction": -21.2,
    "test/kl": 4.1,
    "test/mutual_information": 3.1,
    "test/marginal_kl": 1.0,
    "test/active_units": 2,
    "test/nll": 24.3,
    "test/nll_stderr": 0.2,
    "test/nll_particles": 5000,
    "test/bits_per_dim": None,
    "train/steps": 12000,
    "model": "vae",
    "data": "digits",
    "guide": "diagonal",
    "versions": {"torch": "2.15.0"},
    "somebody/elses": 7,
}
SHAPES = {
    "grey": (1, 8, 8),
    "colour": (3, 9, 12),
    "table": (2,),
    "wide_table": (6,),
    "column": (1,),
    "deep": (1, 20, 20),
}


def gallery(kind: str) -> Gallery:
    shape, latent = SHAPES[kind], 5 if kind in ("deep", "wide_table") else 2
    noise = np.random.default_rng(0)
    means = noise.normal(size=(90, latent))
    return Gallery(
        shape=shape,
        value_range=(0.0, 1.0),
        originals=noise.uniform(size=(40, *shape)),
        reconstructions=noise.uniform(size=(40, *shape)),
        samples=noise.uniform(size=(30, *shape)),
        latent_means=means,
        latent_draws=means + 0.3 * noise.normal(size=means.shape),
        prior_draws=noise.normal(size=(500, latent)),
        labels=noise.integers(0, 10, size=90).astype(float),
        kl_per_dimension=noise.exponential(size=latent),
        manifold=noise.uniform(size=(7, 7, *shape)) if latent == 2 else None,
    )


def page_of(kind: str, folder: Path, **summary: object) -> tuple[Path, list[Figure]]:
    figures = draw(gallery(kind), METRICS, folder / "figures", active_threshold=0.01)
    page = write_report(folder, {**SUMMARY, **summary}, "seed: 0\n", "Noise.", figures)
    return page, figures


def test_the_probe_sees_a_broken_picture_and_a_console_error(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text(
        "<html><head><title>x</title></head><body><img src='data:image/png;base64,AAAA'>"
        "<script>console.error('oh')</script></body></html>"
    )
    widths, console = open_page(chromium, page, tmp_path / "profile")
    assert widths == [0]
    assert any("oh" in line for line in console)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_browser_shows_every_picture_and_complains_about_nothing(kind: str, chromium: str, tmp_path: Path) -> None:
    page, figures = page_of(kind, tmp_path)
    widths, console = open_page(chromium, page, tmp_path / "profile")
    assert widths == [imread(figure.path).shape[1] for figure in figures]
    assert min(widths) > 0
    assert console == []


@pytest.mark.parametrize("kind", SHAPES)
def test_every_picture_that_applies_is_drawn_and_not_blank(kind: str, tmp_path: Path) -> None:
    blank = tmp_path / "blank.png"
    canvas.save(canvas.sheet(600, 400), blank)
    assert contrast(blank) < 1e-9
    figures = draw(gallery(kind), METRICS, tmp_path)
    expected = {"training_curves", "reconstructions", "samples", "latent_scatter", "aggregated_posterior"}
    expected |= {"kl_per_dimension"} | ({"manifold"} if kind in ("grey", "colour", "table") else set())
    assert {figure.name for figure in figures} == expected
    for figure in figures:
        assert figure.path == tmp_path / f"{figure.name}.png"
        assert contrast(figure.path) > 0.02, figure.name
        assert figure.title
        assert figure.caption.endswith(".")


def contrast(path: Path) -> float:
    return float(imread(path)[..., :3].astype(float).std(axis=(0, 1)).max())


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    bare = replace(gallery("grey"), latent_means=None, labels=None, kl_per_dimension=None, manifold=None)
    assert [figure.name for figure in draw(bare, [], tmp_path)] == [
        "reconstructions",
        "samples",
        "aggregated_posterior",
    ]
    names = [figure.name for figure in draw(bare, [{"step": 1}, {"step": 2, "valid/kl": 1.0}], tmp_path)]
    assert names[0] == "training_curves"


@pytest.mark.parametrize(
    ("draws", "prior"),
    [
        (np.zeros((50, 2)), np.zeros((50, 2))),
        (np.zeros((1, 4)), np.ones((3, 4))),
        (np.arange(9.0)[:, None], np.arange(9.0)[:, None]),
    ],
    ids=["a point", "one datum", "one dimension"],
)
def test_degenerate_latents_are_drawn_too(draws: np.ndarray, prior: np.ndarray, tmp_path: Path) -> None:
    means = draws if draws.shape[1] > 1 else None
    odd = replace(gallery("grey"), latent_means=means, latent_draws=draws, prior_draws=prior, labels=None)
    odd = replace(odd, manifold=None, kl_per_dimension=np.zeros(draws.shape[1]))
    assert len(draw(odd, METRICS[:1], tmp_path)) == 5 + (means is not None)


def test_latent_grid_has_equal_prior_mass_and_lies_as_on_a_map() -> None:
    grid = latent_grid(4)
    assert np.allclose(norm.cdf(grid[..., 0]), [[0.125, 0.375, 0.625, 0.875]] * 4)
    assert np.allclose(norm.cdf(grid[..., 1]), np.repeat([[0.875], [0.625], [0.375], [0.125]], 4, axis=1))


def test_manifold_has_the_first_latent_to_the_right_and_the_second_upwards(tmp_path: Path) -> None:
    first, second = np.moveaxis(norm.cdf(latent_grid(7)), -1, 0)
    tiles = np.broadcast_to((0.7 * first + 0.3 * second)[..., None, None, None], (7, 7, 1, 20, 20))
    ground = np.zeros((3, 1, 20, 20))  # empty: high is ink
    images = {"originals": ground, "reconstructions": ground, "samples": ground, "manifold": tiles}
    draw(replace(gallery("grey"), shape=(1, 20, 20), **images), [], tmp_path)
    ink = 1.0 - imread(tmp_path / "manifold.png")[..., :3].mean(axis=-1)
    zoom = 1400 // 140
    tops = 12 + 20 * zoom * np.arange(7) + 10 * zoom
    lefts = 110 + 20 * zoom * np.arange(7) + 10 * zoom
    seen = ink[np.ix_(tops, lefts)]  # rows from the top
    rightwards, upwards = np.diff(seen, axis=1), np.diff(seen[::-1], axis=0)
    assert rightwards.min() > 0.05
    assert 0.02 < upwards.min() < upwards.max() < rightwards.min()


def test_each_reconstruction_stands_below_its_original_pixel_by_pixel(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    originals = (noise.uniform(size=(6, 1, 20, 20)) < 0.2).astype(float)
    reconstructions = (noise.uniform(size=(6, 1, 20, 20)) < 0.2).astype(float)
    pairs = replace(gallery("deep"), originals=originals, reconstructions=reconstructions)
    draw(pairs, [], tmp_path)
    ink = imread(tmp_path / "reconstructions.png")[..., 0] < 0.5
    zoom = (canvas.WIDTH - 196 - 2) // 120
    rows = 4 + zoom * np.arange(40) + zoom // 2
    columns = 196 + zoom * np.arange(120) + zoom // 2
    seen = ink[np.ix_(rows, columns)]
    assert np.array_equal(seen[:20], np.concatenate(list(originals[:, 0]), axis=1))
    assert np.array_equal(seen[20:], np.concatenate(list(reconstructions[:, 0]), axis=1))


def test_strokes_are_ink_and_photographs_are_not_negatives() -> None:
    strokes = (np.random.default_rng(0).uniform(size=(9, 1, 8, 8)) < 0.3) * 16.0
    assert canvas.ground_is_low(strokes, (0, 16))
    assert not canvas.ground_is_low(np.random.default_rng(0).uniform(size=(9, 1, 8, 8)) * 16, (0, 16))
    assert canvas.colour(np.ones((1, 2, 2)), (0, 1), high_is_ink=True).max() < 0.3
    assert canvas.colour(np.ones((1, 2, 2)), (0, 1), high_is_ink=False).min() == 1.0
    red = np.stack([np.ones((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))])
    assert np.array_equal(canvas.colour(red, (0, 1), high_is_ink=True)[0, 0], [1, 0, 0])


def test_shapes_that_fit_no_picture_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image .C, H, W. or a table row"):
        replace(gallery("grey"), shape=(8, 8))
    with pytest.raises(ValueError, match=r"samples must be .n, 1, 8, 8."):
        replace(gallery("grey"), samples=np.zeros((3, 8, 8)))


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = (page_of("grey", tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second
    assert page_of("grey", tmp_path / "c", **{"test/elbo": -25.4})[0].read_bytes() != first


def test_the_page_needs_nothing_else_and_executes_nothing(tmp_path: Path) -> None:
    page, figures = page_of("grey", tmp_path)
    text = page.read_text("utf-8")
    assert text.count("data:image/png;base64,") == len(figures)
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", text)
    assert re.search(r"<meta charset=.utf-8.>", text)
    assert len(re.findall(r"<h1>", text)) == 1
    assert len(re.findall(r'<img [^>]*alt="[^"]{20,}"', text)) == len(figures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.html"]


def test_numbers_stand_beside_their_meanings(tmp_path: Path) -> None:
    text = page_of("grey", tmp_path)[0].read_text("utf-8")
    rows = {
        key: (value, meaning)
        for key, value, meaning in re.findall(
            r'<th scope="row">(.*?)</th><td class="[^"]*">(.*?)</td><td class="meaning">(.*?)</td>', text
        )
    }
    assert rows.keys() == SUMMARY.keys()
    assert rows["test/elbo"][0] == "−25.30"
    assert "lower bound" in rows["test/elbo"][1]
    assert rows["test/bits_per_dim"][0] == "—"
    assert rows["somebody/elses"] == ("7", "")
    assert rows["versions"][0] == "torch 2.15.0"
    assert all(meaning for key, (_, meaning) in rows.items() if key != "somebody/elses")


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    figure = draw(gallery("grey"), [], tmp_path / "figures")[0]
    figure = Figure(evil, evil, f'"{evil}', figure.path)
    page = write_report(tmp_path, {"model": evil, evil: evil, "guide": evil}, f"a: {evil}", evil, [figure])
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    # title, heading, guide, four in the tables, data, configuration; of the figure id, heading, caption and alt (twice)
    assert text.count(html.escape(evil)) == 14


def test_a_page_without_numbers_or_pictures_is_still_a_page(chromium: str, tmp_path: Path) -> None:
    page = write_report(tmp_path, {}, "", "", [])
    assert open_page(chromium, page, tmp_path / "profile") == ([], [])


def test_a_failed_write_keeps_the_page_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_report(tmp_path, {"seed": 1}, "", "", [])
    before = page.read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, {"seed": 2}, "", "", [])
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_only_png_pictures_are_embedded(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="is not a PNG"):
        write_report(tmp_path, {}, "", "", [Figure("x", "X", "X.", tmp_path / "x.png")])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (12000, "12\u2009000"),
        (-3, "−3"),
        (1234.567, "1\u2009234.57"),
        (0.5, "0.500"),
        (1.234e-5, "1.23e−05"),
        (True, "True"),
        ("a", "a"),
        ([1, 2.5], "1, 2.500"),
        ([1, 2, 3, 4, 5, 6, 7], "1, 2, 3, 4, 5, 6, … (7 in all)"),
        ({"torch": "2.15"}, "torch 2.15"),
        (float("nan"), "nan"),
    ],
)
def test_values_read_well(value: object, text: str) -> None:
    assert format_value(value) == text
