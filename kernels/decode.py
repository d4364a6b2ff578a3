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
from kernels.rope import rope_tables, rotation, turned

Pair = tuple[Tensor, Tensor | None]      # weight and bias of one product
Places = tuple[Sequence[Tensor], Sequence[Tensor]]


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
        self.qkv, self.bias = [w.mT for w in qkv[0]] if packed else [qkv[0].mT], qkv[1]
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
        return twice(first.weight), twice(second.weight), [w.mT for w in up], [w.mT for w in per_step(ffn.down)]


def twice(weight: Tensor) -> Tensor:
    return torch.cat([weight.detach(), weight.detach()])


class Pair:
    """Memory for x (..., D) and -x beside it.

    x / rms(x) is the LayerNorm of (x, -x), whose mean is 0: on a CPU that is one operation where RMSNorm is eight.
    """

    def __init__(self, like: Tensor, *shape: int) -> None:
        self.D = shape[-1]
        self.both = like.new_empty(*shape[:-1], 2 * self.D)
        self.x, self.minus = self.both.split(self.D, -1)

    def norm(self, weight: Tensor | None, eps: float) -> Tensor:
        """RMSNorm of x, weight (2 D) is `twice` its own.   -> (..., D)"""
        if self.x.is_cuda:
            return torch.rms_norm(self.x, (self.D,), None if weight is None else weight[: self.D], eps)
        torch.neg(self.x, out=self.minus)
        return torch.layer_norm(self.both, (2 * self.D,), weight, None, eps).narrow(-1, 0, self.D)


class ColumnStep:
    """Runs one column through a stack, in memory taken once.   `c` is its StackConfig, `act` the activation of its
    feed-forward networks, `cache` holds its keys and values in the layers from `first` on, `norm` comes behind the last.
    """

    def __init__(self, blocks: Sequence[nn.Module], c: Any, act: Callable[..., Tensor], cache: Cache, first: int = 0,
                 norm: nn.Module | None = None) -> None:
        self.c, self.act, self.norm = c, act, None if norm is None else twice(norm.weight)
        self.layers = [Layer(block, c.packed, c.gated) for block in blocks]
        self.dual = any(block.dual for block in blocks)
        self.store = cache.store[first : first + len(self.layers)].flatten(0, 1)        # (2 layers, B, H_kv, slots, head)
        B, turning = cache.store.shape[2], c.heads + c.kv
        self.pair = Pair(cache.store, B, c.dim)
        self.x = self.pair.x                                                            # where a column may be put
        self.up = cache.store.new_empty(B, (1 + c.gated) * c.ffn)
        self.halves = self.up.chunk(1 + c.gated, 1)
        self.qkv = cache.store.new_empty(B, (turning + c.kv) * c.head)
        heads = self.qkv.view(B, -1, c.head)
        self.raw, self.v = heads.split([turning, c.kv], 1)                              # before RoPE
        self.plain = cache.store.dtype == torch.float32
        aside = c.rope_theta and not (self.plain and c.rope_interleaved)                # RoPE then writes elsewhere
        self.qk = torch.empty_like(self.raw) if aside else self.raw
        self.q, self.k = self.qk.split([c.heads, c.kv], 1)
        self.q = self.q.view(B, c.kv, -1, c.head)                                       # the queries of a key head together
        self.pairs, self.turned = (qk.unflatten(-1, (2, -1)) for qk in (self.raw, self.qk))       # (B, H', 2, head / 2)
        self.parts = [*self.pairs.unbind(2), *self.turned.unbind(2)]
        self.heads = Pair(cache.store, *self.raw.shape)
        self.complex = torch.view_as_complex(self.raw.unflatten(-1, (-1, 2))) if self.plain and c.rope_interleaved else None

    def places(self, slot: int, live: int) -> Places:
        """Where the keys and values of the new column go, and those that it sees: of each layer the keys, then the values."""
        return self.store.select(3, slot).unbind(), self.store.narrow(3, 0, live).unbind()

    def __call__(self, x: Tensor, places: Places, turn: Tensor | None, mask: Tensor | None, audio: bool = False, step: int = 0) -> Tensor:
        """x (B, D) -> (B, D), which the next call may overwrite; mask (B, 1, 1, live) or None, `audio` is the side of all columns"""
        c, B, (new, seen) = self.c, x.shape[0], places
        if x is not self.x:
            self.x.copy_(x)
        turn = turn if turn is None or self.complex is not None else turn.unbind(2)
        for n, layer in enumerate(self.layers):
            attn_norm, ffn_norm, up, down = layer.sides[audio]
            y = self.pair.norm(attn_norm, c.norm_eps)
            if layer.bias is None:
                torch.mm(y, layer.qkv[step], out=self.qkv)
            else:
                torch.addmm(layer.bias, y, layer.qkv[step], out=self.qkv)
            if layer.head_norm is not None:
                self.heads.x.copy_(self.raw)
                torch.mul(self.heads.norm(None, c.norm_eps), layer.head_norm, out=self.raw)
            if turn is not None:
                self.turn(turn)
            new[2 * n].copy_(self.k)
            new[2 * n + 1].copy_(self.v)
            y = F.scaled_dot_product_attention(self.q, seen[2 * n], seen[2 * n + 1], attn_mask=mask)
            self.x.addmm_(y.reshape(B, -1), layer.o[step])
            torch.mm(self.pair.norm(ffn_norm, c.norm_eps), up[step], out=self.up)
            y = self.act(self.halves[0])
            self.x.addmm_(y.mul_(self.halves[1]) if c.gated else y, down[step])
        return self.x if self.norm is None else self.pair.norm(self.norm, c.norm_eps)

    def turn(self, angles: Tensor | tuple[Tensor, Tensor]) -> None:
        """RoPE of the queries and keys."""
        if self.complex is not None:                                                     # (a + ib)(cos + i sin)
            self.complex.mul_(angles)
        elif self.plain:
            (a, b, new_a, new_b), (cos, sin) = self.parts, angles
            torch.mul(self.pairs, cos.unsqueeze(2), out=self.turned)
            new_a.addcmul_(b, sin, value=-1)
            new_b.addcmul_(a, sin)
        else:
            self.qk.copy_(turned(self.raw, rotation(angles, self.c.rope_interleaved)))


class Turns:
    """The angles of RoPE by position, computed once; a fast column looks its own up."""

    def __init__(self, c: Any, like: Tensor) -> None:
        self.c, self.complex = c, c.rope_interleaved and like.dtype == torch.float32
        self.device, self.table = like.device, None

    def __call__(self, positions: Tensor, below: int) -> Tensor:
        """positions (B,), all of them < below -> (B, 1, head/2) complex, or (B, 1, 2, head/2): cosines, sines"""
        if self.table is None or below > len(self.table):
            count = max(256, 2 * below)
            cos, sin = rope_tables(self.c.head, self.c.rope_theta, self.c.rope_scaling, torch.arange(count, device=self.device)[None])
            cos, sin = cos[0, 0][:, None], sin[0, 0][:, None]                            # (count, 1, head/2)
            self.table = torch.complex(cos, sin) if self.complex else torch.stack([cos, sin], 2)
        return self.table.index_select(0, positions)


def column_step(blocks: Sequence[nn.Module], c: Any, act: Callable[[Tensor], Tensor], cache: Cache, first: int = 0,
                norm: nn.Module | None = None) -> ColumnStep | None:
    """The fast way through a stack, or None when it must go block by block."""
    linears = [m for block in blocks for m in block.modules() if hasattr(m, "adapter")]
    adapted = any(m.adapter is not None and m.adapter.enabled and m.adapter.base is None for m in linears)
    types = {p.dtype for block in blocks for p in block.parameters()}
    sets = any(m.weight.dim() == 3 for m in linears)
    odd = any(block.skips_audio or block.listen is not None for block in blocks) or (sets and not c.packed) or (c.packed and c.qkv_bias)
    return None if adapted or odd or types != {cache.store.dtype} else ColumnStep(blocks, c, act, cache, first, norm)
