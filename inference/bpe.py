"""Byte-pair encoding over characters: frequent neighbours become one token (Sennrich, Haddow and Birch 2016)."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

Pair = tuple[str, str]
WORDS = re.compile(r" ?[^ ]+| +")  # a blank belongs to the word behind it; no token reaches across words


def learn(lines: Iterable[str], size: int) -> list[Pair]:
    """The pairs to be joined, in order, until there are ``size`` tokens or no pair occurs twice.

    Of pairs that are equally frequent the first in the order of the alphabet is taken, so that the same lines give the
    same tokens.
    """
    counts = Counter(word for line in lines for word in WORDS.findall(line))
    words = [(list(word), count) for word, count in sorted(counts.items())]
    tokens = {symbol for symbols, _ in words for symbol in symbols}
    often: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)  # words that may have the pair
    for place, (symbols, count) in enumerate(words):
        _count(symbols, count, often, where, place)
    merges: list[Pair] = []
    while len(tokens) < size and often:
        pair = min(often, key=lambda p: (-often[p], p))
        if often[pair] < 2:
            break
        merges.append(pair)
        tokens.add(pair[0] + pair[1])
        for place in sorted(where.pop(pair)):
            symbols, count = words[place]
            for old in pairwise(symbols):
                often[old] -= count
            words[place] = (_joined(symbols, pair), count)
            _count(words[place][0], count, often, where, place)
        often += Counter()  # drops what no longer occurs
    return merges


def encode(line: str, ranks: dict[Pair, int], known: dict[str, list[str]]) -> list[str]:
    """The tokens of a line.

    Args:
        line: any text.
        ranks: each pair's place in what :func:`learn` gave.
        known: words encoded before; added to.
    """
    tokens = []
    for word in WORDS.findall(line):
        if word not in known:
            known[word] = _encode_word(list(word), ranks)
        tokens += known[word]
    return tokens


def vocabulary(alphabet: Iterable[str], merges: Sequence[Pair]) -> list[str]:
    """Every token once: characters in order, then pairs in the order in which they were learnt."""
    return list(dict.fromkeys([*sorted(alphabet), *(a + b for a, b in merges)]))


def _encode_word(symbols: list[str], ranks: dict[Pair, int]) -> list[str]:
    while len(symbols) > 1:
        pair = min(pairwise(symbols), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        symbols = _joined(symbols, pair)
    return symbols


def _joined(symbols: list[str], pair: Pair) -> list[str]:
    """The symbols with each occurrence of the pair made one, from left to right."""
    joined: list[str] = []
    place = 0
    while place < len(symbols):
        both = tuple(symbols[place : place + 2]) == pair
        joined.append(pair[0] + pair[1] if both else symbols[place])
        place += 1 + both
    return joined


def _count(symbols: list[str], count: int, often: Counter[Pair], where: dict[Pair, set[int]], place: int) -> None:
    for pair in pairwise(symbols):
        often[pair] += count
        where[pair].add(place)
