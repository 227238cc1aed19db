"""The drawing of the bound against the numbers that it draws."""

import pytest

from inference.decomposition import LEFT, RIGHT, decompose


@pytest.mark.parametrize(
    ("reconstruction", "kl", "gap", "broken"),
    [(-10.0, 7.5, 1.0, False), (-80.0, 25.0, 4.0, True), (640.0, 7.7, 2.4, True), (2.0, 5.0, 0.5, False)],
    ids=["zero near", "zero far right", "zero far left", "zero inside"],
)
def test_the_drawing_is_to_scale(reconstruction: float, kl: float, gap: float, broken: bool) -> None:
    elbo = reconstruction - kl
    drawing = decompose(
        {
            "test/reconstruction": reconstruction,
            "test/kl": kl,
            "test/elbo": elbo,
            "test/nll": -(elbo + gap),
            "test/mutual_information": 0.75 * kl,
            "test/marginal_kl": 0.25 * kl,
        }
    )
    assert drawing is not None
    information, marginal = drawing.bars["kl"]
    unit = (information.width + marginal.width) / kl  # drawing units for one nat
    assert information.width == pytest.approx(0.75 * kl * unit, abs=0.05)
    assert drawing.bars["evidence"][1].width == pytest.approx(gap * unit, abs=0.05)
    assert drawing.at["reconstruction"] - drawing.at["elbo"] == pytest.approx(kl * unit, abs=0.05)
    assert (drawing.broken is not None) == broken
    if not broken:
        assert drawing.bars["elbo"][0].width == pytest.approx(abs(elbo) * unit, abs=0.05)
    for bar in (bar for row in drawing.bars.values() for bar in row):
        assert bar.width >= 0
        assert LEFT - 0.1 <= bar.x <= bar.x + bar.width <= RIGHT + 0.1


def test_a_collapsed_posterior_looks_collapsed_and_sampling_error_is_no_gap() -> None:
    drawing = decompose({"test/elbo": -200.001, "test/reconstruction": -200.0, "test/kl": 0.001, "test/nll": 200.1})
    assert drawing is not None
    assert drawing.bars["kl"][0].width < 1.0
    assert [bar.kind for bar in drawing.bars["evidence"]] == ["evidence"]


def test_no_drawing_without_the_terms() -> None:
    assert decompose({"test/elbo": -1.0, "test/kl": None, "test/reconstruction": float("nan")}) is None


def test_a_bound_that_stands_for_log_p_draws_no_gap() -> None:
    """Of a guide without randomness nothing is known but the bound."""
    known = {"test/elbo": -27.8, "test/reconstruction": -18.2, "test/kl": 9.6, "test/nll": 27.8}
    alone, sampled = (decompose({**known, "test/nll_particles": count}) for count in (1, 100))
    assert alone is not None
    assert sampled is not None
    assert "evidence" in sampled.bars
    assert "gap" in sampled.values
    assert "evidence" not in alone.bars
    assert "gap" not in alone.values
