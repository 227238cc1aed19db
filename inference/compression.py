"""Grids of codes as a file, and back: a range coder that is told the prior's probabilities (row by row, as they come).

Which bits an entropy coder writes depends on the last digit of every probability. Both directions therefore ask the
prior in the same way: place after place, for the same batches of grids, with what is known so far; and a message is
decoded with the same weights on the same kind of machine that wrote it.
"""

import io
import math
from collections.abc import Iterator

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from models.tokens import Autoregressive, TokenPrior

CHUNK = 256  # grids whose places are coded together


def compress(prior: TokenPrior, tokens: Tensor, context: Tensor | None = None) -> bytes:
    """Tokens ``(N, H, W)``, given their contexts if the prior reads any, as one message.

    Its length is the prior's -log2 p(tokens), rounded up to whole bytes, and at most one byte more; the coder rounds
    probabilities to steps of 2^-24.
    """
    coder, family = stream.queue.RangeEncoder(), stream.model.Categorical(perfect=False)
    for start in range(0, len(tokens), CHUNK):
        some = tokens[start : start + CHUNK]
        known = torch.zeros_like(some)
        for row, column, probabilities in _places(prior, known, _part(context, start)):
            symbols = some[:, row, column]
            coder.encode(symbols.cpu().numpy().astype(np.int32), family, probabilities)
            known[:, row, column] = symbols
    return _shortest(coder)


def decompress(prior: TokenPrior, message: bytes, count: int, context: Tensor | None = None) -> Tensor:
    """The ``count`` grids of a message, ``(count, H, W)``, given the contexts with which it was written.

    Raises:
        ValueError: the message was written under another prior; not every such message is recognized.
    """
    words = np.frombuffer(message + bytes(-len(message) % 4), ">u4").astype(np.uint32)
    coder, family = stream.queue.RangeDecoder(words), stream.model.Categorical(perfect=False)
    device = next(prior.parameters()).device
    grids = []
    for start in range(0, count, CHUNK):
        known = torch.zeros(min(CHUNK, count - start), *prior.event_shape, dtype=torch.long, device=device)
        for row, column, probabilities in _places(prior, known, _part(context, start)):
            try:
                symbols = coder.decode(family, probabilities).astype(np.int64)
            except AssertionError:
                raise ValueError("the message was not written with this prior and these contexts") from None
            known[:, row, column] = torch.from_numpy(symbols).to(device)
        grids.append(known)
    return torch.cat(grids)


@torch.no_grad()
def _places(prior: TokenPrior, known: Tensor, context: Tensor | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Place after place in raster order, the probabilities ``(B, K)`` given what ``known`` holds by then."""
    training = prior.training
    prior.eval()
    try:
        p = prior() if context is None else prior(context)
        assert isinstance(p, Autoregressive)
        for row in range(prior.event_shape[0]):
            for column in range(prior.event_shape[1]):
                here = p.logits_at(known, context, row, column).double().softmax(-1)
                yield row, column, here.cpu().numpy()
    finally:
        prior.train(training)


def _shortest(coder: stream.queue.RangeEncoder) -> bytes:
    """The fewest bytes that name a number in the coder's last interval; the decoder reads zeros after them.

    The coder's own message has room for another one behind it, which costs up to two words of 32 bits.
    """
    written, (lower, width) = coder.pos()  # words that are settled; the interval below them, in 64 bits
    words = coder.get_compressed()[: written + 1].astype(">u4").tobytes()
    start = (int.from_bytes(words, "big") << 32) - -lower % 2**32  # the last word is the start's, rounded up
    length = len(words) + 4
    for size in range(length):
        rest = 8 * (length - size)  # bits left to the zeros
        number = -(-start >> rest)  # rounded up
        if number << rest < start + width:
            return number.to_bytes(size, "big")
    raise AssertionError("an interval holds a number of as many digits as its bounds have")


def _part(context: Tensor | None, start: int) -> Tensor | None:
    return None if context is None else context[start : start + CHUNK]


def bits(message: bytes) -> int:
    """Length of a message."""
    return 8 * len(message)


def raw_bits(shape: tuple[int, ...], levels: int) -> int:
    """Bits of a datum without compression: whole bits for each number, 8 for 256 levels."""
    return math.prod(shape) * math.ceil(math.log2(levels))


def token_bits(places: int, codes: int) -> float:
    """Bits of a grid of equally long code numbers, H W log2 K."""
    return places * math.log2(codes)


def png_bits(images: np.ndarray, levels: int) -> np.ndarray:
    """Bits of each image ``(N, C, H, W)`` of whole numbers below ``levels`` as a PNG, headers included: ``(N,)``.

    Two levels are written with one bit for each pixel, more with eight.

    Raises:
        ValueError: neither one nor three channels, which is all that is written here.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"a PNG has one or three channels: accepted: (N, 1 or 3, H, W), got {images.shape}")
    spread = 255 // (levels - 1)  # equal steps between the levels, whole numbers
    lengths = []
    for image in (images * spread).round().astype(np.uint8):
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        file = io.BytesIO()
        (picture.convert("1", dither=Image.Dither.NONE) if levels == 2 and len(image) == 1 else picture).save(
            file, format="PNG", optimize=True
        )
        lengths.append(8 * len(file.getvalue()))
    return np.array(lengths)
