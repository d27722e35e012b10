"""Turns a valid file into one that nobody should have written: bits, lengths, splices, numbers and nesting."""

import re
import struct
from collections.abc import Callable
from random import Random

Mutation = Callable[[Random, bytes], bytes]

_SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_NUMBERS = (
    b"-1",
    b"0",
    b"1e999",
    b"-0.0",
    b"NaN",
    b"1" * 400,
    b"2147483648",
    b"9223372036854775808",
    b"1.5",
    b"1e-400",
)
_VALUES = (b"null", b"true", b"[]", b"{}", b'""', b'"../../x"', b'"/dev/zero"', b'"\\u0000"', b'"\\ud800"', b"[[[]]]")
_PIECES = (
    b"\x00",
    b"\xff" * 4,
    b"\xef\xbb\xbf",
    b"\r",
    b"&a [*a]",
    b"!!python/name:os.system ",
    b"\t",
    b"}",
    b"{",
    b",",
)


def flip(random: Random, data: bytes) -> bytes:
    """One to eight bits, most often near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[_place(random, data)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(random: Random, data: bytes) -> bytes:
    """The end is gone."""
    return data[: random.randrange(len(data))]


def hole(random: Random, data: bytes) -> bytes:
    """Some bytes in the middle are gone, or zero."""
    start = _place(random, data)
    stop = min(len(data), start + random.choice((1, 4, 16, 4096)))
    return data[:start] + random.choice((b"", bytes(stop - start))) + data[stop:]


def splice(random: Random, data: bytes) -> bytes:
    """A piece of the file stands at another place of it, over what was there or beside it."""
    start, at = random.randrange(len(data)), _place(random, data)
    piece = data[start : start + random.choice((1, 8, 64, 2000))]
    return data[:at] + piece + data[at + random.choice((0, len(piece))) :]


def grow(random: Random, data: bytes) -> bytes:
    """More of the same, or anything, at the end."""
    return data + random.choice((data, random.randbytes(random.randint(1, 300)), bytes(64)))


def size(random: Random, data: bytes) -> bytes:
    """A length or an offset of 1 to 8 bytes becomes one at the edge of what there is."""
    kind = random.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
    width = struct.calcsize(kind)
    if len(data) < width:
        return data + b"\xff" * width
    at = min(_place(random, data), len(data) - width)
    value = random.choice((*_SIZES, len(data), len(data) + 1, len(data) - 1)) % 2 ** (8 * width)
    return data[:at] + struct.pack(kind, value) + data[at + width :]


def number(random: Random, data: bytes) -> bytes:
    """A number that is written in digits becomes another one."""
    return _instead_of(random, data, rb"-?\d+(\.\d+)?([eE]-?\d+)?", random.choice(_NUMBERS))


def value(random: Random, data: bytes) -> bytes:
    """A word or a text of JSON or YAML becomes something of another kind."""
    return _instead_of(random, data, rb'"[^"]{0,80}"|\b(true|false|null)\b|\b[a-z_]{3,}\b', random.choice(_VALUES))


def word(random: Random, data: bytes) -> bytes:
    """One word of the file in the place of another."""
    words = re.findall(rb"[A-Za-z_][\w./-]{1,40}", data[:20_000])
    return _instead_of(random, data, rb"[A-Za-z_][\w./-]{1,40}", random.choice(words)) if words else flip(random, data)


def piece(random: Random, data: bytes) -> bytes:
    """Bytes that mean something to some reader, anywhere."""
    at = _place(random, data)
    return data[:at] + random.choice(_PIECES) + data[at:]


def nest(random: Random, data: bytes) -> bytes:
    """Brackets in brackets, as a value or around all."""
    depth = random.choice((10, 1000, 100_000))
    left, right = random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")")))
    deep = left * depth + b"1" + right * depth
    return random.choice((deep, _instead_of(random, data, rb'"[^"]{0,80}"|\d+', deep), left * depth))


def lines(random: Random, data: bytes) -> bytes:
    """Lines change places, stand twice or are gone."""
    rows = data.split(b"\n")
    at, other = random.randrange(len(rows)), random.randrange(len(rows))
    rows[at : at + 1] = random.choice(([], [rows[at]] * 2, [rows[other]], [rows[at] + rows[other]]))
    return b"\n".join(rows)


MUTATIONS: tuple[Mutation, ...] = (flip, cut, hole, splice, grow, size, number, value, word, piece, nest, lines)


def mutate(random: Random, data: bytes) -> bytes:
    """One to four mutations of a file, one after the other."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(MUTATIONS)(random, data) if data else random.randbytes(random.randint(0, 40))
    return data


def _place(random: Random, data: bytes) -> int:
    return random.randrange(min(len(data), random.choice((16, 300, len(data)))))


def _instead_of(random: Random, data: bytes, what: bytes, instead: bytes) -> bytes:
    """``instead`` in the place of one match among the first thousands of bytes, or of all."""
    found = list(re.finditer(what, data[:60_000]))
    if not found:
        return flip(random, data)
    match = random.choice(found)
    return data[: match.start()] + instead + data[match.end() :]
