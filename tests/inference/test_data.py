"""Observations and batches: what a likelihood sees, noise, order, resume, streaming."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from inference.data import Batches, DataError, Source, representation_for
from inference.rows import binary, grey, real
from inference.streaming import _Reader

GREY = np.arange(17, dtype=np.uint8).repeat(3).reshape(17, 3)


def same_for_all(rows):
    return {"train": rows, "valid": rows, "test": rows}


def grey_data(rows=GREY, levels=17, binarization="dynamic"):
    return grey("toy", same_for_all(rows), levels, binarization, "toy")


def numbered(count):
    """Rows that are their own numbers."""
    return real("numbered", same_for_all(np.arange(count, dtype=np.float64)[:, None]), "toy")


def epoch_of(batches):
    return torch.cat(list(batches))


# What a likelihood may see


@pytest.mark.parametrize(
    ("kind", "supports", "levels"),
    [
        ("grey", "levels", 17),
        ("grey", "real", None),
        ("dynamic", "binary", None),
        ("dynamic", "levels", 2),
        ("bits", "binary", None),
        ("bits", "levels", 2),
        ("real", "real", None),
    ],
)
def test_likelihoods_that_fit_are_accepted(kind, supports, levels):
    assert representation_for(example(kind), supports, levels) == supports


@pytest.mark.parametrize(
    ("kind", "supports", "levels", "words"),
    [
        ("grey", "binary", None, ("not normalized", "data.binarization=dynamic", "likelihood=logistic")),
        ("grey", "levels", 256, ("17 values", "levels=17")),
        ("dynamic", "real", None, ("no upper bound", "likelihood=bernoulli", "data.binarization=none")),
        ("dynamic", "levels", 17, ("2 values", "levels=2")),
        ("bits", "real", None, ("no upper bound", "likelihood=bernoulli")),
        ("real", "binary", None, ("likelihood=learned_gaussian",)),
        ("real", "levels", 2, ("likelihood=learned_gaussian",)),
        ("real", "complex", None, ("binary, levels, real",)),
    ],
)
def test_likelihoods_that_do_not_fit_are_refused_with_a_remedy(kind, supports, levels, words):
    with pytest.raises(DataError) as refusal:
        representation_for(example(kind), supports, levels)
    assert all(word in str(refusal.value) for word in words)


def example(kind):
    return {
        "grey": lambda: grey_data(binarization="none"),
        "dynamic": lambda: grey_data(binarization="dynamic"),
        "bits": lambda: binary("toy", same_for_all(GREY % 2), "toy"),
        "real": lambda: numbered(5),
    }[kind]()


def test_a_bernoulli_formula_on_greys_does_not_integrate_to_one():
    """The reason for the refusal: int_0^1 p^x (1 - p)^(1 - x) dx differs from 1."""
    x = torch.linspace(0, 1, 10001)
    assert torch.trapezoid(0.2**x * 0.8 ** (1 - x), x) < 0.5


# Noise


def test_dynamic_bits_have_the_grey_value_as_their_mean():
    source, draws = Source(grey_data(), "train", "binary"), 4000
    generator = torch.Generator().manual_seed(1)
    mean = source.batch(torch.arange(17).repeat(draws), generator).reshape(draws, 17, 3).mean(0)
    expected = torch.from_numpy(GREY) / 16
    error = 5 * (expected * (1 - expected) / draws).sqrt()
    wrong = torch.from_numpy(GREY) / 17
    assert ((mean - wrong).abs() > error).any()
    assert ((mean - expected).abs() <= error).all()  # 0 and 16 are hit exactly: their error is 0


def test_dynamic_bits_are_fresh_and_belong_to_the_generator():
    source, index = Source(grey_data(), "train", "binary"), torch.arange(17)
    generator = torch.Generator().manual_seed(1)
    first, second = source.batch(index, generator), source.batch(index, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, source.batch(index, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [17, 256])
def test_dequantized_greys_are_uniform_within_their_level(levels, dtype):
    rows = np.full((2, 50000), levels - 1, dtype=np.uint8)
    rows[0] = 3
    x = Source(grey_data(rows, levels, "none"), "train", "real", dtype=dtype).batch(torch.arange(2))
    noise = x * levels - torch.from_numpy(rows)
    assert x.dtype == dtype
    assert x.min() >= 0
    assert x.max() < 1
    assert noise.min() > -1e-4
    assert noise.max() < 1 + 1e-4
    assert abs(noise.mean() - 0.5) < 5 * (1 / 12 / noise.numel()) ** 0.5
    assert abs(noise.var() - 1 / 12) < 5 * (1 / 180 / noise.numel()) ** 0.5  # var of (u - 1/2)^2 is 1/180


def test_levels_and_real_rows_are_seen_as_they_are():
    assert torch.equal(Source(grey_data(binarization="none"), "train", "levels").fixed(), torch.tensor(GREY).double())
    assert torch.equal(Source(numbered(4), "train", "real").batch(torch.tensor([3, 1])), torch.tensor([[3.0], [1.0]]))


@pytest.mark.parametrize(("representation", "binarization"), [("binary", "dynamic"), ("real", "none")])
def test_fixed_noise_is_drawn_once(representation, binarization):
    rows = np.full((2500, 1, 2, 2), 8, dtype=np.uint8)
    data = grey_data(rows, 17, binarization)
    source = Source(data, "test", representation, seed=3)
    whole = source.fixed()
    torch.manual_seed(99)
    source.batch(torch.arange(7))
    index = torch.tensor([2499, 0, 1023, 1024, 5])
    assert torch.equal(source.fixed(), whole)
    assert torch.equal(source.fixed(index), whole[index])
    assert torch.equal(Source(data, "test", representation, seed=3, resident="no").fixed(index), whole[index])
    assert not torch.equal(Source(data, "test", representation, seed=4).fixed(), whole)
    assert not torch.equal(Source(data, "valid", representation, seed=3).fixed(), whole)
    assert not torch.equal(whole[:1024], whole[1024:2048])
    single = Source(data, "test", representation, seed=3, dtype=torch.float32).fixed()
    assert torch.allclose(single.double(), whole, atol=1e-6)


def test_static_binarization_is_one_draw():
    rows = np.full((500, 40), 8, dtype=np.uint8)
    first, second = (grey_data(rows, 17, "static") for _ in range(2))
    assert (first.kind, first.levels, first.default_likelihood) == ("binary", 2, "bernoulli")
    assert all(torch.equal(first.splits[split], second.splits[split]) for split in first.splits)
    assert not torch.equal(first.splits["train"], first.splits["test"])
    assert abs(first.splits["train"].double().mean() - 0.5) < 5 * 0.5 / 20000**0.5
    source = Source(first, "train", "binary")
    assert torch.equal(source.batch(torch.arange(500)), source.fixed())


# Batches


def test_an_epoch_has_every_row_once_in_another_order_each_time():
    batches = Batches(Source(numbered(10), "train", "real"), 4, seed=1)
    epochs = [list(batches) for _ in range(3)]
    assert [len(x) for x in epochs[0]] == [4, 4, 2]
    assert all(torch.equal(torch.cat(epoch).flatten().sort().values, torch.arange(10.0)) for epoch in epochs)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert (batches.epoch, batches.position) == (3, 0)


def test_drop_last_and_impossible_sizes():
    source = Source(numbered(10), "train", "real")
    assert [len(x) for x in Batches(source, 4, drop_last=True)] == [4, 4]
    for size, drop_last in ((0, False), (11, True)):
        with pytest.raises(DataError, match="accepted: 1 to 10"):
            Batches(source, size, drop_last=drop_last)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("resident", ["yes", "no"])
def test_a_restored_state_continues_with_the_same_numbers(taken, resident):
    def make(seed):
        return Batches(Source(grey_data(), "train", "binary", resident=resident, workers=0), 6, seed=seed)

    original, restored = make(1), make(2)
    for _ in itertools.islice(forever(original), taken):
        pass
    restored.load_state_dict(original.state_dict())
    assert (restored.epoch, restored.position) == (original.epoch, original.position)
    for expected, found in itertools.islice(zip(forever(original), forever(restored), strict=True), 7):
        assert torch.equal(expected, found)


def forever(batches):
    while True:
        yield from batches


def test_a_break_and_a_state_taken_inside_the_loop_count_the_batch_in_hand():
    batches, reference = (Batches(Source(numbered(10), "train", "real"), 4, seed=1) for _ in range(2))
    expected = epoch_of(reference)
    first = next(iter(batches))
    state = batches.state_dict()
    assert torch.equal(torch.cat([first, epoch_of(batches)]), expected)
    batches.load_state_dict(state)
    assert torch.equal(torch.cat([first, epoch_of(batches)]), expected)


def test_a_state_of_other_batches_is_refused():
    state = Batches(Source(numbered(10), "train", "real"), 4).state_dict()
    for count, size in ((10, 5), (11, 4)):
        with pytest.raises(DataError, match=f"accepted: {count} rows in batches of {size}"):
            Batches(Source(numbered(count), "train", "real"), size).load_state_dict(state)
    with pytest.raises(DataError, match="generator"):
        Batches(Source(numbered(10), "train", "real"), 4).load_state_dict(
            {**state, "generator": torch.zeros(16, dtype=torch.uint8)}
        )


# Streaming


def mapped(path, rows):
    np.save(path, rows)
    return grey_data(np.load(path, mmap_mode="r"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_streamed_batches_are_the_resident_ones(tmp_path, where, workers):
    resident = Source(grey_data(), "train", "binary", resident="yes")
    data = grey_data() if where == "memory" else mapped(tmp_path / "x.npy", GREY)
    streamed = Source(data, "train", "binary", resident="no", workers=workers)
    assert resident.resident
    assert not streamed.resident
    pairs = Batches(resident, 5, seed=1), Batches(streamed, 5, seed=1)
    before = torch.get_rng_state()
    for _ in range(2):
        expected, found = (list(batches) for batches in pairs)
        assert len(expected) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    states = [batches.state_dict() for batches in pairs]
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def test_a_split_is_resident_if_it_takes_at_most_half_of_free_memory(tmp_path, monkeypatch):
    data = mapped(tmp_path / "x.npy", GREY)
    for free, resident in ((2 * GREY.nbytes, True), (2 * GREY.nbytes - 1, False)):
        monkeypatch.setattr("inference.streaming.free_bytes", lambda device, free=free: free)
        assert Source(data, "train", "binary").resident is resident
    assert Source(grey_data(), "train", "binary").resident  # in the host's memory already


def test_a_memory_map_travels_to_a_worker_as_its_place(tmp_path):
    data = mapped(tmp_path / "x.npy", np.tile(GREY, (1000, 1)))
    letter = pickle.dumps(_Reader(data.splits["train"]))
    assert len(letter) < 1000
    assert torch.equal(pickle.loads(letter)[np.array([16, 3])], torch.from_numpy(GREY[[16, 3]]))


def test_datasets_and_sources_refuse_what_they_cannot_hold():
    with pytest.raises(DataError, match="accepted: train, valid, test"):
        Source(numbered(4), "dev", "real")
    with pytest.raises(DataError, match="auto, yes, no"):
        Source(numbered(4), "train", "real", resident="maybe")
    with pytest.raises(DataError, match="N > 0"):
        real("toy", same_for_all(np.zeros((0, 2))), "toy")
    with pytest.raises(DataError, match="exactly train, valid, test"):
        real("toy", {"train": np.zeros((1, 2)), "test": np.zeros((1, 2)), "valid": np.zeros((1, 2)), "x": GREY}, "toy")


@pytest.mark.gpu
def test_batches_on_a_gpu_never_wait_for_the_device():
    rows = np.full((2500, 1, 4, 4), 8, dtype=np.uint8)
    sources = [Source(grey_data(rows), "train", "binary", "cuda", resident=where) for where in ("yes", "no")]
    resident, streamed = (Batches(source, 64, seed=1) for source in sources)
    assert torch.equal(sources[0].fixed().cpu(), Source(grey_data(rows), "train", "binary").fixed())
    list(resident)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(resident)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    list(streamed)
    assert all(torch.equal(a, b) for a, b in zip(batches, streamed, strict=True))
