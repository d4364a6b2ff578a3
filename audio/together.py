"""The same call on many streams at once: what a server decodes for eight sessions costs little more than for one.

    together([a, b, c], "decode", [codes_a, codes_b, codes_c])  ->  what a.decode(codes_a) gives, b's, c's, within rounding

Streams can share a call when their states have the same shapes and agree in everything else, as they do a few frames behind
their beginnings. A class says with `ROWS = True` that every tensor of its state has the items in front. Others run alone.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn


def together(streams: Sequence[Any], call: str, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Give each stream of one item its piece (1, ...); -> what each call returns, in order."""
    groups, results = defaultdict[Hashable, list[int]](list), [torch.empty(0)] * len(streams)
    for n, (stream, piece) in enumerate(zip(streams, pieces, strict=True)):
        groups[(type(stream), state_key(vars(stream)), piece.shape) if getattr(stream, "ROWS", False) else n].append(n)
    for places in groups.values():
        if len(places) == 1:
            results[places[0]] = getattr(streams[places[0]], call)(pieces[places[0]])
            continue
        whole = join([streams[n] for n in places])
        made = getattr(whole, call)(torch.cat([pieces[n] for n in places]))
        for row, n in enumerate(places):
            vars(streams[n]).update(vars(part(whole, row)))
            results[n] = made[row : row + 1]
    return results


def children(x: Any) -> dict[Any, Any] | None:
    """What a state consists of; None for a tensor, a module, which streams share, and a plain value."""
    if isinstance(x, (list, tuple)):
        return dict(enumerate(x))
    return x if isinstance(x, dict) else vars(x) if hasattr(x, "__dict__") and not isinstance(x, (Tensor, nn.Module)) else None


def state_key(x: Any) -> Hashable:
    """Equal for states that can be joined."""
    if isinstance(x, Tensor):
        return x.shape
    if (inside := children(x)) is not None:
        return type(x), tuple((name, state_key(value)) for name, value in inside.items())
    return id(x) if isinstance(x, nn.Module) else x


def rebuilt(x: Any, inside: dict[Any, Any]) -> Any:
    """A state like x of other parts."""
    if isinstance(x, (list, tuple, dict)):
        return inside if isinstance(x, dict) else type(x)(inside.values())
    new = copy(x)
    vars(new).update(inside)
    return new


def join(states: Sequence[Any]) -> Any:
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if children(first) is None:
        return first
    inside = [children(state) for state in states]
    return rebuilt(first, {name: join([each[name] for each in inside]) for name in inside[0]})


def part(state: Any, row: int) -> Any:
    if isinstance(state, Tensor):
        return state[row : row + 1]
    if (inside := children(state)) is None:
        return state
    return rebuilt(state, {name: part(value, row) for name, value in inside.items()})
