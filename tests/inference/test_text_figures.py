"""Pictures of lines show the lines; what is drawn entry by entry is shown as draws and says so."""

import numpy as np
import pytest
import torch

from inference import pictures
from inference.assemble import assemble
from inference.canvas import save
from inference.config import load
from inference.console import Quiet
from inference.evaluate import EvaluationSettings, evaluate
from inference.experiment import train
from inference.figures import draw
from inference.pictures import gallery
from inference.text_figures import line_interpolations, line_reconstructions, line_samples


def shown(picture):
    return [text.get_text() for axes in picture.sheet.axes for text in axes.texts]


def test_characters_that_the_fonts_lack_are_drawn_without_a_warning(tmp_path):
    """Warnings are errors here: matplotlib warns of each character that it has no shape for."""
    picture = line_samples(["мир 🙂 ελπίδα", "שלום", "你好"])
    save(picture.sheet, tmp_path / "lines.png")
    assert (tmp_path / "lines.png").stat().st_size > 1000


def test_every_line_is_on_the_page_with_what_it_is():
    pair = line_reconstructions(["to be", "or $not$"], ["to bee", ""])
    words = [
        "original",
        "to be",
        "reconstruction",
        "to bee",
        "original",
        "or $not$",
        "reconstruction",
        "(an empty line)",
    ]
    assert shown(pair) == words
    assert shown(line_samples([f"line {place}" for place in range(30)]))[1::2] == [
        f"line {place}" for place in range(20)
    ]
    between = shown(line_interpolations([["a", "b", "c"], ["d", "e", "f"]]))
    assert between[::2] == ["first", "", "second"] * 2
    assert between[1::2] == list("abcdef")
    (long,) = shown(line_samples(["x" * 200]))[1::2]
    assert long.endswith("…")
    assert len(long) < 100


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.txt"
    path.write_text("\n".join(["the cat", "the dog sees", "a cat sees the dog", "dogs", "the end"] * 30))
    return path


def words_for(path):
    return ["data=lines", f"data.path='{path}'", "data.length=10", "encoder=gru", "encoder.hidden=6", "encoder.width=4",
            "likelihood.hidden=6", "likelihood.width=4", "model.latent_dim=2"]  # fmt: skip


def test_the_gallery_of_lines(toy, tmp_path):
    setup = assemble(load(words_for(toy)))
    made = gallery(setup)
    assert made.between.shape == (3, 7, 10)
    assert made.manifold is None
    x = setup.source("test").fixed()
    assert {tuple(row) for row in made.originals} <= {tuple(row) for row in x.double().numpy()}
    ends = np.diff((made.samples == 0).astype(int), axis=1)
    assert (ends >= 0).all()  # nothing after the end of a line
    names = [figure.name for figure in draw(made, [], tmp_path / "figures")]
    assert names[:3] == ["reconstructions", "samples", "interpolations"]
    again = gallery(setup)
    assert np.array_equal(made.samples, again.samples)


def test_between_two_clusters_there_is_nothing(toy):
    """Site c is a number: the line half-way is read off one cluster or the other, and codes z go straight."""
    clusters = ["model=gmm_vae", "guide=clustering", "objective=trace_enum", "model.components=3"]
    setup = assemble(load([*words_for(toy), *clusters]))
    seen = []
    decode = pictures.decode

    def listening(model, latents, like):
        seen.append(latents)
        return decode(model, latents, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "decode", listening)
        assert gallery(setup).between.shape == (3, 7, 10)
    ends, path = seen[0], seen[-1]  # of the reconstructions, whose first six are the pairs' ends; of the lines between
    c, z = (path[name].unflatten(0, (3, 7)) for name in ("c", "z"))
    first, second = ends["c"][:3], ends["c"][3:6]
    assert torch.equal(c, torch.stack([first] * 3 + [second] * 4, dim=1))
    assert torch.allclose(z[:, 3], (ends["z"][:3] + ends["z"][3:6]) / 2)


def test_images_drawn_pixel_by_pixel_are_called_draws(tmp_path):
    small = ["likelihood.channels=4", "likelihood.layers=1", "likelihood.features=2"]
    made = gallery(assemble(load(["likelihood=pixelcnn", *small])))
    assert made.drawn
    assert set(np.unique(made.samples)) == set(np.unique(made.reconstructions)) == {0.0, 1.0}
    captions = {figure.name: figure.caption for figure in draw(made, [], tmp_path)}
    assert "a draw of p(x|z)" in captions["reconstructions"]
    assert "draws of p(x|z)" in captions["samples"]
    plain = {figure.name: figure.caption for figure in draw(gallery(assemble(load([]))), [], tmp_path)}
    assert "the mean of p(x|z)" in plain["reconstructions"]


def test_code_lengths_are_per_token_that_carries_information(toy):
    setup = assemble(load(words_for(toy)))
    x = setup.source("test").fixed()
    settings = EvaluationSettings(particles=5, elbo_samples=2, surgery_data=10, khat_data=5)
    numbers, evidence = evaluate(setup.model, setup.guide, x, settings, seed=0)
    tokens = sum(min(line.index(0.0) + 1, 10) if 0.0 in line else 10 for line in x.tolist())
    assert numbers["test/tokens"] == tokens < x.numel()
    nats = -float(evidence.log_p.double().sum()) / tokens
    assert numbers["test/nll_per_token"] == pytest.approx(nats, rel=1e-9)
    assert numbers["test/perplexity"] == pytest.approx(np.exp(nats), rel=1e-9)
    assert numbers["test/bits_per_dim"] == pytest.approx(nats / np.log(2), rel=1e-9)
    assert "test/perplexity" not in evaluate(*_images(), settings, seed=0)[0]


def _images():
    setup = assemble(load(["encoder.hidden=[4]", "decoder.hidden=[4]"]))
    return setup.model, setup.guide, setup.source("test").fixed()[:20]


def test_a_run_on_lines_from_start_to_page(toy, tmp_path):
    torch.set_default_dtype(torch.float32)
    words = [*words_for(toy), "trainer.steps=3", "evaluation.particles=5", "evaluation.elbo_samples=2",
             "inference=aggressive", f"run.dir='{tmp_path / 'run'}'"]  # fmt: skip
    folder = train(load(words), Quiet())
    assert (folder / "figures" / "interpolations.png").is_file()
    page = (folder / "report.html").read_text()
    assert "Between two lines" in page
    assert "as if each token" in page
