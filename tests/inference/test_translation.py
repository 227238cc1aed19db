"""Translation without pairs: a cipher broken by EM with a known language model, and backtranslation without one."""

import numpy as np
import pytest
import torch

from inference import tables
from inference.backtranslation import backtranslation, lean, train_backtranslation, with_language_model
from inference.em import EMSettings, fit
from models.hmm import HMM

TEXT = "a at an as is it in on or no not to so sea tea tree see rest nest stone store train rain east it is in ratio "
TEXT += "nation ten one art rose toast station orient reason tenor"
WORDS = TEXT.split()
LETTERS = [*sorted(set("".join(WORDS))), " "]


def write(words, seed):
    """Letters of a text of so many words, as numbers."""
    choice = np.random.default_rng(seed).integers(len(WORDS), size=words)
    return np.array([LETTERS.index(letter) for letter in " ".join(WORDS[place] for place in choice)])


def language_model():
    """Letter and bigram frequencies of another text than the one to be read."""
    text = write(3000, seed=0)
    pairs = np.full((len(LETTERS), len(LETTERS)), 0.05)
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    return torch.tensor(np.log(np.bincount(text) / len(text))), torch.tensor(np.log(pairs))


def cipher_model(length):
    model = HMM((length,), len(LETTERS), "categorical", len(LETTERS), held=("initial", "transition"))
    letters, pairs = language_model()
    model.initial_logits.copy_(letters)
    model.transition_logits.copy_(pairs)
    return model


@pytest.mark.slow
@pytest.mark.row("3.48")
def test_em_with_a_known_language_breaks_a_cipher():
    length, lines = 25, 40
    plain = write(500, seed=1)[: length * lines].reshape(lines, length)
    code = np.random.default_rng(2).permutation(len(LETTERS))
    x = torch.tensor(code[plain].astype(float))
    model = cipher_model(length)
    with torch.no_grad():
        model.symbol_logits.copy_(torch.where(torch.tensor(np.eye(len(LETTERS))[code] > 0), 0.0, -50.0))
        truth = float(model.log_evidence(x).sum())
        before = {name: value.clone() for name, value in model.named_buffers()}
        model.initialize(x, torch.Generator().manual_seed(0))
        assert np.mean(model.viterbi(x)[0].numpy() == plain) < 0.5
    fit(model, x, EMSettings(iterations=80, tolerance=1e-5, restarts=5, seed=0))
    read = model.viterbi(x)[0].numpy()
    assert np.mean(read == plain) >= 0.95
    assert float(model.log_evidence(x).sum().detach()) >= truth
    found = model.symbol_logits.softmax(1).argmax(1).numpy()
    assert np.mean(found == code) >= 0.85  # letter by letter; rare ones may be missed
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_what_is_held_is_not_a_parameter():
    model = cipher_model(4)
    assert [name for name, _ in model.named_parameters()] == ["symbol_logits"]
    letters = model.transition_logits.clone()
    x = torch.tensor(write(20, seed=3)[:40].reshape(10, 4).astype(float))
    statistics, _ = model.e_step(x)
    model.symbol_logits.data.normal_()
    with pytest.raises(ValueError, match="initial and transition"):
        HMM((4,), 2, "categorical", 2, held=("emission",))
    assert torch.equal(model.transition_logits, letters)
    assert set(model.state_dict()) == {"initial_logits", "transition_logits", "symbol_logits"}
    assert "transition" in statistics


# --- backtranslation ---------------------------------------------------------------------------------------------

SIZE = 5


def pair(seed=0):
    frequencies = torch.tensor(np.array([5.0, 4.0, 3.0, 2.0, 1.0]) / 15)
    truth = torch.tensor(np.random.default_rng(3).permutation(SIZE))  # symbol y means sentence truth[y]
    source = frequencies[truth]
    return tables.free_decoder(source, SIZE, seed, spread=0.1), frequencies, truth


@pytest.mark.row("3.49")
def test_both_losses_reach_zero_and_one_direction_is_the_inverse_of_the_other():
    both, language, truth = pair()
    lean(both, truth, 2.0)
    start = backtranslation(both, language)
    assert min(float(loss.detach()) for loss in start) > 0.3
    end = train_backtranslation(both, language)
    assert max(float(loss) for loss in end) < 1e-3
    decoder = tables.prior_and_decoder(both)[1]
    assert np.abs(both.posterior @ decoder - np.eye(SIZE)).max() < 1e-3  # Q = P^-1
    assert np.array_equal(both.posterior.argmax(1), truth.numpy())


@pytest.mark.row("3.49")
def test_without_a_language_model_a_permuted_start_is_as_good():
    right, language, truth = pair()
    wrong, _, _ = pair()
    lean(right, truth, 2.0)
    lean(wrong, truth.roll(1), 2.0)
    for both in (right, wrong):
        assert max(float(loss) for loss in train_backtranslation(both, language)) < 1e-3
    assert np.array_equal(wrong.posterior.argmax(1), truth.roll(1).numpy())
    decoder = tables.prior_and_decoder(wrong)[1]
    assert np.abs(wrong.posterior @ decoder - np.eye(SIZE)).max() < 1e-3
    vague, _, _ = pair()
    lean(vague, truth, 2.0)
    stuck = train_backtranslation(vague, language, held=True)  # each the other's inverse already, and no clearer
    assert max(float(loss) for loss in stuck) > 0.5
    # What tells them apart is how often sentences are said: under the language model, the ELBO.
    expected = float((language * language.log()).sum())  # log p(y) of the truth, averaged
    assert with_language_model(right, language) == pytest.approx(expected, abs=5e-3)
    assert with_language_model(wrong, language) < expected - 0.1
