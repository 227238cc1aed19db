"""Token priors: normalized, causal, drawn as they are scored, and trained to the entropy of a known source."""

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from inference.codes import fit_tokens, token_nll
from models.codebook import Codebook
from models.masked_tokens import MaskedTransformer
from models.pixelcnn import PixelCNN
from models.tokens import MarkovTable, PositionTable, TwoLevelTokens
from models.transformer import CausalTransformer
from models.vq import CodePrior, UniformTokens

GRID, CODES = (2, 2), 3
GRIDS = torch.tensor(list(itertools.product(range(CODES), repeat=4))).reshape(81, *GRID)
PRIORS = {
    "table": PositionTable,
    "markov": MarkovTable,
    "stationary markov": lambda *args, **kw: MarkovTable(*args, **kw, positional=False),
    "pixelcnn": lambda *args, **kw: PixelCNN(*args, **kw, channels=6, layers=2),
    "transformer": lambda *args, **kw: CausalTransformer(*args, **kw, width=8, layers=2, heads=2),
    "masked": lambda *args, **kw: MaskedTransformer(*args, **kw, width=8, layers=2, heads=2).eval(),
}
NEURAL = ["pixelcnn", "transformer"]


def build(name, grid=GRID, codes=CODES, noise=0.5, **options):
    prior = PRIORS[name](grid, codes, **options)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return prior


@pytest.mark.row("0.39", "3.38")
@pytest.mark.parametrize("name", PRIORS)
def test_masses_sum_to_one(name):
    log_p = build(name)().log_prob(GRIDS)
    assert log_p.std() > 0.1
    assert torch.allclose(log_p.exp().sum(), torch.tensor(1.0), atol=1e-12)


@pytest.mark.parametrize("name", PRIORS)
def test_masses_sum_to_one_for_each_class(name):
    prior = build(name, context_codes=4)
    log_p = torch.stack([prior(torch.full((81,), label)).log_prob(GRIDS) for label in range(4)])
    assert torch.allclose(log_p.exp().sum(1), torch.ones(4), atol=1e-12)
    assert log_p.std(0).max() > 0.1


@pytest.mark.row("0.39", "3.38")
@pytest.mark.parametrize("name", NEURAL)
def test_the_jacobian_is_causal(name):
    """Logits at a place have derivatives by all earlier embeddings, and by none of its own or later ones."""
    grid = (3, 4)
    prior = build(name, grid, noise=0.0)
    kept = {}

    def keep(module, inputs, output):
        kept["embedded"] = output.detach().requires_grad_()
        return kept["embedded"]

    handle = prior.embedding.register_forward_hook(keep)
    logits = prior.logits(torch.randint(CODES, (1, *grid)), None).reshape(12, CODES)
    handle.remove()
    embedded = kept["embedded"]
    jacobian = torch.zeros(12, 12)
    for place in range(12):
        (gradient,) = torch.autograd.grad(logits[place].square().sum(), embedded, retain_graph=True, allow_unused=True)
        by_place = gradient.reshape(-1, gradient.shape[-1]).abs().sum(-1)
        jacobian[place, : len(by_place)] = by_place  # the transformer embeds all but the last token
    assert torch.equal(jacobian.triu(), torch.zeros(12, 12))
    assert (jacobian.diagonal(-1) > 0).all() if name == "transformer" else (jacobian.diagonal(-1) > 0).sum() >= 9


@pytest.mark.parametrize("context", [False, True], ids=["alone", "class"])
@pytest.mark.parametrize("name", PRIORS)
def test_later_tokens_change_nothing_earlier(name, context):
    grid = (3, 4)
    prior = build(name, grid, context_codes=2 * context)
    given = torch.ones(1, dtype=torch.long) if context else None
    tokens = torch.randint(CODES, (1, *grid))
    before, felt = prior.logits(tokens, given).reshape(12, CODES), False
    for place in range(12):
        changed = tokens.clone().reshape(-1)
        changed[place] = (changed[place] + 1) % CODES
        after = prior.logits(changed.reshape(1, *grid), given).reshape(12, CODES)
        assert torch.equal(after[: place + 1], before[: place + 1])
        felt = felt or not torch.equal(after, before)
    assert felt == (name != "table")


def test_a_pixelcnn_sees_all_that_came_before():
    """No blind spot: with layers enough, the last place feels every earlier one, to the right and above too."""
    prior = PixelCNN((4, 5), CODES, channels=6, layers=6)
    tokens = torch.randint(CODES, (4, 5))
    before = prior.logits(tokens[None], None)[0, 3, 1]
    for row, column in itertools.product(range(4), range(5)):
        if (row, column) < (3, 1):
            changed = tokens.clone()
            changed[row, column] = (changed[row, column] + 1) % CODES
            assert not torch.equal(prior.logits(changed[None], None)[0, 3, 1], before), (row, column)


@pytest.mark.row("0.39", "3.38")
@pytest.mark.parametrize("name", PRIORS)
def test_draws_are_as_frequent_as_their_mass(name):
    prior, count = build(name), 20_000
    expected = count * prior().log_prob(GRIDS).detach().exp()
    digits = prior().sample((count,)).flatten(1) @ torch.tensor([27, 9, 3, 1])
    observed = torch.bincount(digits, minlength=81).double()

    def p_value(expected):
        rare = expected < 5
        pool = lambda counts: [*counts[~rare].tolist(), *([counts[rare].sum().item()] if rare.any() else [])]  # noqa: E731
        return chisquare(pool(observed), pool(expected)).pvalue

    assert p_value(torch.full((81,), count / 81)) < 1e-6
    assert p_value(expected) > 1e-3


@pytest.mark.parametrize("name", PRIORS)
def test_shapes(name):
    plain, classes = build(name)(), build(name, context_codes=4)(torch.tensor([[0, 1, 2], [3, 3, 0]]))
    assert plain.sample((7,)).shape == (7, *GRID)
    assert plain.expand((5,)).sample().shape == (5, *GRID)
    assert plain.expand((5,)).log_prob(GRIDS[:5]).shape == (5,)
    assert classes.batch_shape == (2, 3)
    draws = classes.sample((7,))
    assert draws.shape == (7, 2, 3, *GRID)
    assert draws.dtype == torch.long
    assert torch.allclose(classes.expand((7, 2, 3)).log_prob(draws), classes.log_prob(draws), atol=1e-12)


@pytest.mark.row("3.38")
@pytest.mark.parametrize("name", ["markov", "stationary markov", "table"])
def test_tables_fit_in_closed_form(name):
    """The relative frequencies are the likeliest table: no descent finds a better one."""
    tokens, context = torch.randint(CODES, (200, *GRID)) // 2, torch.randint(2, (200,))
    prior = PRIORS[name](GRID, CODES, context_codes=2)
    uniform = token_nll(prior, tokens, context).mean()
    assert math.isclose(uniform, 4 * math.log(3), rel_tol=1e-12)
    prior.fit(tokens, context, smoothing=1e-9)
    fitted = prior(context).log_prob(tokens).mean()
    gradients = torch.autograd.grad(fitted, list(prior.parameters()))
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)
    assert -fitted < uniform - 0.1
    with pytest.raises(ValueError, match="smoothing"):
        prior.fit(tokens, context, smoothing=0.0)


def test_positional_frequencies_by_hand():
    tokens = torch.tensor([[[0, 1]], [[0, 2]], [[1, 1]]])
    table, markov = PositionTable((1, 2), 3), MarkovTable((1, 2), 3)
    table.fit(tokens)
    markov.fit(tokens)
    assert table().log_prob(tokens[0]).exp().item() == pytest.approx(3 / 6 * 3 / 6)
    assert markov().log_prob(tokens[0]).exp().item() == pytest.approx(3 / 6 * 2 / 5)


def markov_source(count, grid, transition):
    """Raster-scanned Markov chains from the uniform start, and their log-masses."""
    tokens = torch.zeros(count, math.prod(grid), dtype=torch.long)
    tokens[:, 0] = torch.randint(len(transition), (count,))
    for t in range(1, tokens.shape[1]):
        tokens[:, t] = torch.multinomial(transition[tokens[:, t - 1]], 1).squeeze(-1)
    log_p = transition[tokens[:, :-1], tokens[:, 1:]].log().sum(1) - math.log(len(transition))
    return tokens.reshape(count, *grid), log_p


TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], dtype=torch.float64)


@pytest.mark.row("0.39", "3.8", "3.38")
@pytest.mark.parametrize("name", [*NEURAL, "stationary markov", "markov"])
def test_training_reaches_the_entropy_of_a_known_source(name):
    torch.set_default_dtype(torch.float32)
    grid = (2, 3)
    train, _ = markov_source(40_000, grid, TRANSITION.float())
    test, log_p = markov_source(20_000, grid, TRANSITION.float())
    # Entropy of the source: log 3, and H(P[s]) over the distribution of the state at each later place.
    state, entropy = torch.full((3,), 1 / 3, dtype=torch.float64), math.log(3)
    for _ in range(5):
        entropy += float(state @ -(TRANSITION * TRANSITION.log()).sum(1))
        state = state @ TRANSITION
    assert abs(float(-log_p.mean()) - entropy) < 5 * float(log_p.std()) / 20_000**0.5
    options = {"pixelcnn": {"channels": 12, "layers": 2}, "transformer": {"width": 16, "layers": 1, "heads": 2}}.get(
        name, {}
    )
    makers = {"pixelcnn": PixelCNN, "transformer": CausalTransformer}
    prior = makers[name](grid, CODES, **options) if name in makers else PRIORS[name](grid, CODES)

    def excess():  # over the source's own code lengths of the same grids, which cancels the noise
        return float(token_nll(prior, test).mean() + log_p.mean())

    assert excess() > 0.2
    if name in makers:
        fit_tokens(prior, train, steps=400, batch_size=128, learning_rate=1e-2)
    else:
        prior.fit(train)
    assert abs(excess()) < 0.02


@pytest.mark.parametrize("name", NEURAL)
def test_two_levels_sum_to_one(name):
    top, bottom = build("pixelcnn", (1, 2), 2), build(name, GRID, CODES, context_shape=(1, 2), context_codes=2)
    joint = TwoLevelTokens(top, bottom)
    tops = torch.tensor(list(itertools.product(range(2), repeat=2))).reshape(4, 1, 2)
    log_p = joint.log_prob(tops.repeat_interleave(81, 0), GRIDS.repeat(4, 1, 1))
    assert torch.allclose(log_p.exp().sum(), torch.tensor(1.0), atol=1e-12)
    assert log_p.reshape(4, 81).std(0).max() > 0.1
    above, below = joint.sample((5,))
    assert above.shape == (5, 1, 2)
    assert below.shape == (5, *GRID)
    with pytest.raises(ValueError, match="the bottom reads grids"):
        TwoLevelTokens(top, build(name))


@pytest.mark.parametrize("name", NEURAL)
def test_two_levels_beat_independent_ones(name):
    """Bottom tokens that copy the top: knowing it saves what the two have in common."""
    torch.set_default_dtype(torch.float32)
    top = torch.randint(2, (2000, 1, 1))
    bottom = (top.expand(-1, 2, 2) + (torch.rand(2000, 2, 2) < 0.1)) % 2
    given, alone = build(name, GRID, 2, 0.0, context_shape=(1, 1), context_codes=2), PositionTable(GRID, 2)
    above = PositionTable((1, 1), 2)
    above.fit(top)
    alone.fit(bottom)
    fit_tokens(given, bottom, top, steps=150, learning_rate=1e-2)
    joint = -TwoLevelTokens(above, given).log_prob(top, bottom).mean()
    independent = token_nll(above, top).mean() + token_nll(alone, bottom).mean()
    entropy = math.log(2) - 4 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert joint < independent - 1
    assert abs(float(joint.detach()) - entropy) < 0.1


@pytest.mark.row("2.15", "3.38")
def test_a_prior_fitted_afterwards_takes_the_place_of_the_uniform_one():
    codebook, tokens = Codebook(CODES, 2), GRIDS[torch.randint(20, (50,))]
    fitted = MarkovTable(GRID, CODES)
    fitted.fit(tokens)
    prior = CodePrior(codebook, GRID)
    vectors = codebook.embed(tokens).movedim(-1, 1)
    assert torch.allclose(prior().log_prob(vectors), torch.full((50,), -4 * math.log(3)), atol=1e-12)
    prior.tokens = fitted
    assert torch.allclose(prior().log_prob(vectors), fitted().log_prob(tokens), atol=1e-12)
    assert prior().log_prob(vectors).mean() > -4 * math.log(3) + 0.1
    draws = prior().expand((2000,)).sample()
    frequency = (codebook.nearest(draws.movedim(1, -1))[:, 0, 0] == 0).double().mean()
    expected = fitted.table[0, 0, CODES].softmax(0)[0]
    assert abs(frequency - 1 / 3) > 0.1
    assert abs(frequency - expected) < 5 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("name", NEURAL)
def test_every_parameter_learns(name):
    prior = build(name, context_codes=3)
    prior(torch.randint(3, (40,))).log_prob(GRIDS[:40]).sum().backward()
    for parameter_name, parameter in prior.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        PositionTable((4,), 3)
    with pytest.raises(ValueError, match="at least 2 values"):
        PositionTable(GRID, 1)
    with pytest.raises(ValueError, match="accepted: none; got 1"):
        PositionTable(GRID, 3)(torch.tensor([1]))
    with pytest.raises(ValueError, match="accepted: one"):
        PositionTable(GRID, 3, context_codes=2)()
    with pytest.raises(ValueError, match="context_codes"):
        PixelCNN(GRID, 3, context_shape=(1, 1))
    with pytest.raises(ValueError, match="kernel must be odd"):
        PixelCNN(GRID, 3, kernel=4)
    with pytest.raises(ValueError, match="multiple of heads"):
        CausalTransformer(GRID, 3, width=9, heads=2)
    with pytest.raises(ValueError, match="tokens come in grids"):
        CodePrior(Codebook(3, 2), (1, 2), UniformTokens(GRID, 3))
