"""One column of a transformer stack, where no gradient is wanted: what generation spends its time on.

    x = x + o(attend(rope(qkv(norm x))))        x = x + down(act(gate(norm x)) * up(norm x))        x (B, D)

`Block` in model.py is the definition. This computes the same from fewer, larger operations: q, k, v are one product and
so are gate and up, the residual is added by the product that makes it, the queries of a key head share one attention.
It takes stacks whose blocks are plain: adapters merged, one type of weights, no fast-forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Cache
from kernels.rope import Rotation, rotation, turned

Pair = tuple[Tensor, Tensor | None]      # weight and bias of one product


def joined(linears: Sequence[Any]) -> Pair:
    """One weight for Linears that read the same input. Theirs become views of it: nothing is held twice or grows stale."""
    weights = [m.weight for m in linears]
    first, place = weights[0], weights[0].data_ptr()
    together = len(weights) > 1
    for w in weights:                                        # do they lie one behind the other already?
        together = together and w.data_ptr() == place and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        place += w.numel() * w.element_size()
    rows = sum(w.shape[0] for w in weights)
    if len(weights) == 1:
        whole = first
    elif together:
        whole = first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    else:
        with torch.inference_mode(False), torch.no_grad():   # the parameters stay ordinary ones, ready to be trained
            whole = torch.cat([w.detach() for w in weights])
            for w, part in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
                w.data = part
    return whole.detach(), None if linears[0].bias is None else torch.cat([m.bias.detach() for m in linears])


def per_step(linear: Any) -> list[Tensor]:
    """The weight of each depth step; a temporal stack has one."""
    weight = linear.weight.detach()
    return [weight] if weight.dim() == 2 else [weight[k] for k in linear.schedule or range(len(weight))]


class Layer:
    """The weights of a block. `sides` are its norms and feed-forward network for text columns, and for audio columns."""

    def __init__(self, block: nn.Module, packed: bool, gated: bool) -> None:
        attn = block.attn
        qkv = (per_step(attn.qkv), None) if packed else joined([attn.q, attn.k, attn.v])
        self.qkv, self.bias = qkv if packed else ([qkv[0]], qkv[1])
        self.o = [w.mT for w in per_step(attn.o)]
        self.head_norm = None
        if hasattr(attn, "q_norm"):
            heads = [attn.c.heads, attn.c.kv]
            norms = [attn.q_norm.weight.detach(), attn.k_norm.weight.detach()]
            self.head_norm = torch.cat([w.expand(n, -1) for w, n in zip(norms, heads, strict=True)])    # (H + H_kv, head)
        self.sides = [self.side(block.attn_norm, block.ffn_norm, block.ffn, packed, gated)]
        self.sides += [self.side(block.audio_attn_norm, block.audio_ffn_norm, block.audio_ffn, packed, gated)] if block.dual else self.sides

    def side(self, first: Any, second: Any, ffn: Any, packed: bool, gated: bool) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        up = per_step(ffn.gate_up) if packed and gated else [joined([ffn.gate, ffn.up])[0]] if gated else per_step(ffn.up)
        return first.weight.detach(), second.weight.detach(), up, [w.mT for w in per_step(ffn.down)]


class ColumnStep:
    """Runs one column through a stack.   `c` is its StackConfig, `act` the activation of its feed-forward networks"""

    def __init__(self, blocks: Sequence[nn.Module], c: Any, act: Callable[..., Tensor]) -> None:
        self.c, self.act = c, act
        self.layers = [Layer(block, c.packed, c.gated) for block in blocks]

    def __call__(self, x: Tensor, cache: Cache, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, audio: bool = False,
                 step: int = 0) -> Tensor:
        """x (B, D) -> (B, D); the slot of `cache` is reserved, mask (B, 1, 1, live) or None, `audio` is the side of all columns"""
        c, B = self.c, x.shape[0]
        turn = None if rope is None else rotation([t[:, :, 0] for t in rope], c.rope_interleaved)
        slots = cache.store.select(3, cache.slots.start).unbind()                        # of each layer: (B, 2 H_kv, head)
        live = cache.store.narrow(3, 0, cache.live)
        keys, values = live.narrow(2, 0, c.kv).unbind(), live.narrow(2, c.kv, c.kv).unbind()
        for n, layer in enumerate(self.layers):                                          # tails have layers of the cache too
            attn_norm, ffn_norm, up, down = layer.sides[audio]
            y = F.linear(torch.rms_norm(x, (c.dim,), attn_norm, c.norm_eps), layer.qkv[step], layer.bias).view(B, -1, c.head)
            if layer.head_norm is not None or turn is not None:
                y = self.turn(y, layer.head_norm, turn)
            slots[n].copy_(y.narrow(1, c.heads, 2 * c.kv))
            q = y.narrow(1, 0, c.heads).view(B, c.kv, -1, c.head)                        # the queries of a key head together
            y = F.scaled_dot_product_attention(q, keys[n], values[n], attn_mask=mask)
            x = torch.addmm(x, y.reshape(B, -1), layer.o[step])
            y = F.linear(torch.rms_norm(x, (c.dim,), ffn_norm, c.norm_eps), up[step])
            if c.gated:
                gate, y = y.chunk(2, 1)
                x = torch.addmm(x, self.act(gate).mul_(y), down[step])
            else:
                x = torch.addmm(x, self.act(y), down[step])
        return x

    def turn(self, y: Tensor, norm: Tensor | None, turn: Rotation | None) -> Tensor:
        """Norms and RoPE of the queries and keys among y (B, H + 2 H_kv, head); the values stay."""
        qk, v = y.split([self.c.heads + self.c.kv, self.c.kv], 1)
        if norm is not None:
            qk = torch.rms_norm(qk, (self.c.head,), None, self.c.norm_eps) * norm
        return torch.cat([qk if turn is None else turned(qk, turn), v], 1)


def column_step(blocks: Sequence[nn.Module], c: Any, act: Callable[[Tensor], Tensor]) -> ColumnStep | None:
    """The fast way through a stack, or None when it must go block by block."""
    linears = [m for block in blocks for m in block.modules() if hasattr(m, "adapter")]
    adapted = any(m.adapter is not None and m.adapter.enabled and m.adapter.base is None for m in linears)
    types = {p.dtype for block in blocks for p in block.parameters()}
    sets = any(m.weight.dim() == 3 for m in linears)
    odd = any(block.skips_audio for block in blocks) or (sets and not c.packed) or (c.packed and c.qkv_bias)
    return None if adapted or odd or len(types) != 1 else ColumnStep(blocks, c, act)
