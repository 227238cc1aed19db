"""Decoders of lines against sums over all lines, Jacobians and frequencies; encoders against what they may not see."""

import itertools

import pytest
import torch

from models.text import END, LSTMLikelihood, TransformerLikelihood, scored
from models.text_nets import GRUEncoder, LSTMEncoder

KINDS = {
    "lstm": lambda **o: LSTMLikelihood((3,), (2,), 3, width=4, hidden=5, **o),
    "lstm skip": lambda **o: LSTMLikelihood((3,), (2,), 3, width=4, hidden=5, layers=2, skip=True, **o),
    "transformer": lambda **o: TransformerLikelihood((3,), (2,), 3, width=4, heads=2, **o),
    "transformer skip": lambda **o: TransformerLikelihood((3,), (2,), 3, width=4, heads=2, skip=True, **o),
}


@pytest.fixture(params=KINDS)
def likelihood(request):
    return build(request.param)


def build(kind, **options):
    torch.manual_seed(0)
    made = KINDS[kind](**options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def every_line(length=3, levels=3):
    """All rows of tokens, lines or not."""
    return torch.tensor(list(itertools.product(range(levels), repeat=length))).to(torch.get_default_dtype())


@pytest.mark.row("3.8")
def test_the_mass_of_all_lines_is_one_whatever_the_latent(likelihood):
    mass = likelihood(torch.randn(4, 1, 2)).log_prob(every_line()).exp()  # (4, 27)
    assert torch.allclose(mass.sum(1), torch.ones(4), atol=1e-12)
    assert (mass[0] - mass[1]).abs().max() > 1e-3


def test_nothing_follows_the_end(likelihood):
    p_x = likelihood(torch.randn(2))
    assert p_x.log_prob(torch.tensor([1.0, END, 2.0])) == -torch.inf
    assert p_x.log_prob(torch.tensor([1.0, END, END])).isfinite()
    x = every_line()
    lines = torch.tensor([END not in row[: row.index(END)] and not any(row[row.index(END) :]) if END in row else True
                          for row in x.int().tolist()])  # fmt: skip
    assert torch.equal(p_x.expand((27,)).log_prob(x).isfinite(), lines)


@pytest.mark.row("3.8")
def test_a_token_is_told_of_those_before_it_alone(likelihood):
    lines, z = likelihood.lines, torch.randn(1, 2)
    before = torch.tensor([[lines.begin, 1, 2]])
    for place in range(3):
        changed = before.clone()
        changed[0, place] = 0
        moved = (lines.read(changed, z) - lines.read(before, z)).abs().sum(-1)[0] > 1e-12
        assert moved.tolist() == [later >= place for later in range(3)]


def test_writing_token_by_token_uses_the_same_logits(likelihood):
    lines, z, state = likelihood.lines, torch.randn(4, 2), None
    before = torch.tensor([[lines.begin, 1, 2]]).expand(4, 3)
    whole = lines.read(before, z)
    for place in range(3):
        here, state = lines.follow(before[:, place], z, state)
        assert torch.allclose(here, whole[:, place], atol=1e-12)


@pytest.mark.row("3.8")
def test_draws_come_as_often_as_they_should(likelihood):
    p_x, count = likelihood(torch.randn(2)), 20_000
    expected = p_x.expand((27,)).log_prob(every_line()).exp().detach()
    places = (p_x.sample((count,)) @ torch.tensor([9.0, 3.0, 1.0])).long()
    seen = torch.bincount(places, minlength=27) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert (seen[expected == 0] == 0).all()
    possible = expected > 0

    def off(wanted):
        return ((seen - wanted).abs()[possible] / error[possible]).max()

    assert off(expected[torch.randperm(27)]) > 5  # a wrong answer would be found out
    assert off(expected) < 5


@pytest.mark.parametrize("kind", ["lstm skip", "transformer skip"])
def test_with_skip_the_latent_enters_every_layer(kind):
    made = build(kind)
    z, before = torch.randn(1, 2), torch.tensor([[made.lines.begin, 1, 2]])
    whole = made.lines.read(before, z)
    if kind == "lstm skip":  # the last columns of what each layer and the logits read
        entries = [layer.weight_ih_l0[:, -2:] for layer in made.lines.layers] + [made.lines.head.weight[:, -2:]]
    else:
        entries = [told.weight for told in made.lines.told]
    assert len(entries) == (3 if kind == "lstm skip" else 2)
    for entry in entries:
        with torch.no_grad():
            kept = entry.clone()
            entry.zero_()
            assert (made.lines.read(before, z) - whole).abs().max() > 1e-6
            entry.copy_(kept)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_word_dropout_hides_all_at_one_and_nothing_in_evaluation(kind):
    made = build(kind, word_dropout=1.0)
    x, z = torch.tensor([[1.0, 2.0, 1.0], [2.0, 2.0, 1.0]]), torch.randn(1, 2).expand(2, 2)
    kept = build(kind)(z).log_prob(x)
    assert torch.equal(made.eval()(z).log_prob(x), kept)
    made.train()
    lines = made.lines
    hidden = torch.tensor([[lines.begin, lines.hidden, lines.hidden]])
    log_p = lines.read(hidden, z[:1]).log_softmax(-1)[0]
    expected = torch.stack([log_p[torch.arange(3), row.long()].sum() for row in x])
    assert torch.allclose(made(z).log_prob(x), expected, atol=1e-12)
    assert not torch.allclose(expected, kept)


def test_the_share_of_hidden_words_is_the_one_asked_for():
    lines = build("lstm", word_dropout=0.3).lines.train()
    share = float((lines._worn(torch.ones(200, 200, dtype=torch.long)) == lines.hidden).double().mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 40_000) ** 0.5


def test_greedy_takes_the_likeliest_token_each_time(likelihood):
    z = torch.randn(5, 2)
    greedy = likelihood(z).greedy()
    assert torch.equal(greedy, likelihood(z).greedy())
    before = torch.cat([torch.full((5, 1), float(likelihood.lines.begin)), greedy[:, :-1]], 1).long()
    best = likelihood.lines.read(before, z).argmax(-1)
    assert torch.equal(torch.where(scored(greedy), best, END), greedy.long())


def test_tokens_are_counted_up_to_the_end(likelihood):
    x = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert likelihood.token_counts(x).tolist() == [3, 2, 1]


def test_it_starts_at_the_frequencies_of_the_tokens(likelihood):
    with torch.no_grad():
        likelihood.lines.head.weight.zero_()
    likelihood.initialize(torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 0.0]]))  # 3 ones, 1 two, 1 end
    first = likelihood.lines.head.bias.softmax(-1)
    assert torch.allclose(first, torch.tensor([2 / 8, 4 / 8, 2 / 8]), atol=1e-12)


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
@pytest.mark.parametrize("kind", [GRUEncoder, LSTMEncoder])
def test_an_encoder_reads_every_token_and_no_padding(kind, pool):
    net = kind((5,), (2, 3), levels=4, width=3, hidden=6, pool=pool)
    long = torch.tensor([[1.0, 2.0, 3.0, 1.0, 2.0]])
    short = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0]])
    assert net(long.expand(3, 1, 5)).shape == (3, 1, 2, 3)
    brief = kind((3,), (2, 3), levels=4, width=3, hidden=6, pool=pool)
    brief.load_state_dict(net.state_dict())
    assert torch.allclose(brief(short[:, :3]), net(short), atol=1e-12)  # the same line in a shorter row
    for place in range(5):
        changed = long.clone()
        changed[0, place] = 1 + changed[0, place] % 3
        assert (net(changed) - net(long)).abs().max() > 1e-9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LSTMLikelihood((1, 4, 4), (2,), 3), r"\(T,\)"),
        (lambda: LSTMLikelihood((4,), (2,), 3, word_dropout=1.5), "probability"),
        (lambda: LSTMLikelihood((4,), (2,), 3, layers=0), "at least 1"),
        (lambda: TransformerLikelihood((4,), (2,), 3, width=5, heads=2), "multiple"),
        (lambda: GRUEncoder((4,), (2,), 3, pool="first"), "pool"),
        (lambda: GRUEncoder((1, 4, 4), (2,), 3), r"\(T,\)"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
