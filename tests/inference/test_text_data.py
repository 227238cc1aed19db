"""Lines of text as data: rows of tokens and back, byte pairs against counting by hand, what is refused."""

import gzip
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from inference import bpe
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.data import DataError, representation_for
from inference.datasets import digits
from inference.text import lines, shakespeare, written

TOY = ["the cat", "the dog sees", "", "a cat sees the dog", "dogs", "the end"] * 20


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.txt"
    path.write_text("\n".join(TOY))
    return path


@pytest.mark.parametrize("tokens", ["characters", "bpe"])
def test_rows_are_the_lines(toy, tokens):
    data = lines(str(toy), tokens, length=12, vocabulary=24)
    kept = [line for line in TOY if line]
    rows = np.concatenate([data.splits[split].numpy() for split in ("train", "valid", "test")])
    assert len(rows) == len(kept) == 100
    assert [len(data.splits[split]) for split in ("train", "valid", "test")] == [80, 10, 10]
    assert data.levels == len(data.vocabulary) == (24 if tokens == "bpe" else len(set("".join(kept))) + 1)
    for row, line in zip(rows, kept, strict=True):
        text = written(row, data.vocabulary)
        if tokens == "characters":
            assert text == line[:12]
        else:
            assert line.startswith(text)
            assert text == line or (row != 0).all()
    assert ("(20 of 100)" if tokens == "characters" else "tokens are cut") in data.description


def test_a_line_that_ends_early_is_filled_with_ends(toy):
    row = lines(str(toy), length=12).splits["train"][0]
    assert row.tolist().count(0) == 12 - len("the cat")
    assert row[7:].eq(0).all()


def test_byte_pairs_are_those_that_counting_finds():
    text = ["low lower lowest", "new newer newest"] * 3
    merges = bpe.learn(text, size=20)
    words = Counter(word for line in text for word in bpe.WORDS.findall(line))
    parts = {word: list(word) for word in words}
    for merge in merges:  # the whole count anew for each merge
        counts = Counter()
        for word, symbols in parts.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        best = max(counts.values())
        assert merge == min(pair for pair, count in counts.items() if count == best)
        for word, symbols in parts.items():
            parts[word] = bpe._joined(symbols, merge)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for word in words:
        assert bpe.encode(word, ranks, {}) == parts[word]
    assert any(len(token) > 2 for symbols in parts.values() for token in symbols)


def test_tokens_are_joined_back_to_any_line():
    merges = bpe.learn(["aa aa ab", "aaa  b"] * 4, 10)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for line in ["aaaa", "  b a ", "unseen words", " "]:
        assert "".join(bpe.encode(line, ranks, {})) == line


def test_shakespeare_is_split_in_order(tmp_path):
    text = "\n\n".join(f"line {place}" for place in range(100))
    (tmp_path / "tinyshakespeare.txt.gz").write_bytes(gzip.compress(text.encode()))
    data = shakespeare(str(tmp_path))
    assert [len(data.splits[split]) for split in ("train", "valid", "test")] == [90, 5, 5]
    assert written(data.splits["test"][0].numpy(), data.vocabulary) == "line 95"


def test_shuffled_lines_are_the_same_lines_in_one_other_order(tmp_path):
    (tmp_path / "numbers.txt").write_text("\n".join(f"line {place}" for place in range(100)))
    data, again = (lines(str(tmp_path / "numbers.txt"), order="shuffled") for _ in range(2))
    found = {split: [written(row.numpy(), data.vocabulary) for row in rows] for split, rows in data.splits.items()}
    assert sorted(chain(*found.values())) == sorted(f"line {place}" for place in range(100))
    assert found["test"] != [f"line {place}" for place in range(90, 100)]
    assert torch.equal(data.splits["train"], again.splits["train"])
    assert "shuffled once" in data.description


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "random"}, "file, shuffled"),
        ({"path": ""}, "data.path=FILE"),
        ({"path": "nowhere.txt"}, "no such file"),
        ({"tokens": "words"}, "characters, bpe"),
        ({"length": 0}, "1 or more"),
        ({"tokens": "bpe", "vocabulary": 5}, "no more than"),
        ({"valid_fraction": 0.0}, "above 0"),
        ({"valid_fraction": 0.004}, "three splits"),
    ],
)
def test_what_cannot_be_read_is_refused(toy, options, words):
    with pytest.raises(DataError, match=words):
        lines(**{"path": str(toy), **options})


def test_a_missing_shakespeare_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"tinyshakespeare\.txt\.gz is missing"):
        shakespeare(str(tmp_path))


def test_only_likelihoods_of_lines_see_tokens(toy):
    data = lines(str(toy))
    assert representation_for(data, "tokens", data.levels) == "tokens"
    for support in ("binary", "levels", "real"):
        with pytest.raises(DataError, match="lines of tokens; choose likelihood=lstm"):
            representation_for(data, support)
    with pytest.raises(DataError, match="these are none; choose data=shakespeare"):
        representation_for(digits(), "tokens")
    with pytest.raises(DataError, match="built for 9"):
        representation_for(data, "tokens", 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encoder=mlp"], "accepted: encoder=gru or lstm"),
        (["encoder=gru", "likelihood=bernoulli"], "choose likelihood=lstm"),
        (["encoder=gru", "likelihood.heads=2"], "unknown key"),
        (["encoder=gru", "prior=vamp"], "accepted for tokens: prior=aggregated"),
    ],
)
def test_parts_that_do_not_go_with_lines_are_refused(toy, arguments, words):
    with pytest.raises((ConfigError, DataError), match=words):
        assemble(load(["data=lines", f"data.path='{toy}'", *arguments]))


def test_encoders_of_lines_are_refused_for_images():
    with pytest.raises(ConfigError, match="accepted: encoder=mlp"):
        assemble(load(["encoder=gru"]))


def test_parts_for_lines_are_told_the_vocabulary(toy):
    setup = assemble(load(["data=lines", f"data.path='{toy}'", "encoder=gru", "likelihood=transformer"]))
    assert setup.model.likelihood.levels == setup.dataset.levels == setup.guide.core.net.embedding.num_embeddings
    x = setup.source("test").fixed()
    assert x.dtype == torch.get_default_dtype()
    assert x.max() < setup.dataset.levels


def test_a_limit_takes_the_same_rows_always():
    whole, some = assemble(load([])).dataset, assemble(load(["data.limit=50", "seed=3"])).dataset
    rows = {tuple(row.flatten().tolist()) for row in whole.splits["train"]}
    assert len(some.splits["train"]) == len(some.labels["train"]) == 50
    assert all(tuple(row.flatten().tolist()) in rows for row in some.splits["train"])
    assert torch.equal(some.splits["train"], assemble(load(["data.limit=50"])).dataset.splits["train"])
    assert torch.equal(some.splits["test"], whole.splits["test"])
    assert "50 were used" in some.description
    with pytest.raises(DataError, match="1,297 training rows"):
        assemble(load(["data.limit=1298"]))
