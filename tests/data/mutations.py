"""Damaged files: random changes of bytes, and of values of JSON."""

from __future__ import annotations

import json
import random
from typing import Any

HOSTILE = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2**31,
        2**32,
        2**63,
        1e308,
        "",
        "a",
        "\u2581",
        "\x00",
        "(" * 40,
        [],
        {},
        [[]],
    ),
    *({"type": "Sequence"}, {"type": "ByteLevel"}, {"String": ""}, {"Regex": "(a+)+$"}, [None], "\ud800"),
]


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to some dozens of bytes flipped, set, cut out, inserted, copied elsewhere; or the end cut off."""
    found = bytearray(data)
    at, length = draw.randrange(len(found)), draw.choice((1, 1, 2, 4, 16, 64, 200))
    kind = draw.randrange(6)
    if kind == 0:
        for _ in range(length):
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        for _ in range(length):
            found[draw.randrange(len(found))] = draw.choice((0, 1, 127, 128, 255))
    elif kind == 2:
        del found[at:]
    elif kind == 3:
        del found[at : at + length]
    elif kind == 4:
        found[at:at] = draw.randbytes(length)
    else:
        other = draw.randrange(len(found))
        found[other : other + length] = found[at : at + length]
    return bytes(found)


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """One to four values or keys replaced, removed, or put in the place of others, at any depth."""
    contents = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        node: Any = contents
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw.choice(keys)
            below = node[key]
            if not isinstance(below, dict | list) or not below or draw.random() < 0.3:
                break
            node = below
        change = draw.randrange(4)
        if change == 0:
            del node[key]
        elif change == 1:
            node[key] = draw.choice(HOSTILE)
        elif change == 2:
            node[key] = node[draw.choice(keys)]
        elif isinstance(node, dict):
            node[draw.choice(("type", "content", "x", *map(str, keys)))] = node.pop(key)
        if not contents:
            break
    return json.dumps(contents).encode()
