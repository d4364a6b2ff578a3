"""One column through a transformer stack without gradients: the inner loop of generation.

    x = x + o(attend(rope(qkv(norm x))))        x = x + down(act(gate(norm x)) * up(norm x))        x (B, D)

`Block` in model.py is the definition. This computes the same from fewer, larger operations: q, k, v are one product and
so are gate and up, the residual is added by the product that makes it, the queries of a key head share one attention.
Requirements: adapters merged, one dtype of weights or int8, no fast-forward (`supports_fast_decode`). The slot of the column
comes from the host, which then reads only the live part of the cache, or from the device (`RingPosition`), so that a
captured CUDA graph serves every column. Next: decode_attention.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import KVCache
from kernels.decode_attention import decode_attention
from kernels.int8 import int8_linear
from kernels.rope import rope, rope_tables, rotation, turned
from kernels.swiglu import ACTIVATIONS, swiglu

Places = tuple[Sequence[Tensor], Sequence[Tensor]]


class RingPosition(NamedTuple):
    """The slot of a column as device tensors, so that a captured graph reads it at every replay."""

    slot: Tensor                # (1,) slot of the column in the ring buffer
    count: Tensor               # (B,) columns written, this one included
    first: Tensor               # (B,) padding columns before the first real one


class Product:
    """x W^T + b of one column; W (out, in) has the dtype of the model, or is int8 with one scale per row."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, row_scale: Tensor | None = None) -> None:
        self.weight, self.bias, self.row_scale, self.transposed = weight, bias, row_scale, weight.mT

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, in) -> (B, out)"""
        return self.into(x, x.new_empty(len(x), len(self.weight)))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """out = the product"""
        if self.row_scale is not None:
            y = int8_linear(x, self.weight, self.row_scale)
            return out.copy_(y) if self.bias is None else torch.add(y, self.bias, out=out)
        return torch.mm(x, self.transposed, out=out) if self.bias is None else torch.addmm(self.bias, x, self.transposed, out=out)

    def onto(self, x: Tensor, y: Tensor) -> None:
        """x += the product with y; without bias"""
        if self.row_scale is None:
            x.addmm_(y, self.transposed)
        else:
            x.add_(int8_linear(y, self.weight, self.row_scale))


def joined_product(linears: Sequence[Any]) -> Product:
    """One product for Linears that read the same input. Their weights become views of the joined one, so there is no second copy."""
    weights = [m.weight for m in linears]
    first, place = weights[0], weights[0].data_ptr()
    together = len(weights) > 1
    for w in weights:                                        # already adjacent in memory?
        together = together and w.data_ptr() == place and w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        place += w.numel() * w.element_size()
    rows = sum(w.shape[0] for w in weights)
    if len(weights) == 1:
        whole = first
    elif together:
        whole = first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    else:
        with torch.inference_mode(False), torch.no_grad():   # keep ordinary parameters that can be trained
            whole = torch.cat([w.detach() for w in weights])
            for w, part in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
                w.data = part
    bias, scale = (None if getattr(linears[0], name) is None else torch.cat([getattr(m, name).detach() for m in linears])
                   for name in ("bias", "row_scale"))
    return Product(whole.detach(), bias, scale)


def per_step(linear: Any) -> list[Product]:
    """The product of each depth step; a temporal stack has one."""
    weight, scale = linear.weight.detach(), linear.row_scale
    if weight.dim() == 2:
        return [Product(weight, None, scale)]
    return [Product(weight[k], None, None if scale is None else scale[k]) for k in linear.schedule or range(len(weight))]


class Layer:
    """The weights of a block. `sides` are its norms and feed-forward network for text columns, and for audio columns."""

    def __init__(self, block: nn.Module, packed: bool, gated: bool) -> None:
        attn = block.attn
        self.qkv, self.o = per_step(attn.qkv) if packed else [joined_product([attn.q, attn.k, attn.v])], per_step(attn.o)
        self.head_norm = None
        if hasattr(attn, "q_norm"):
            heads = [attn.c.heads, attn.c.kv]
            norms = [attn.q_norm.weight.detach(), attn.k_norm.weight.detach()]
            self.head_norm = torch.cat([w.expand(n, -1) for w, n in zip(norms, heads, strict=True)])    # (H + H_kv, head)
        self.sides = [self.side(block.attn_norm, block.ffn_norm, block.ffn, packed, gated)]
        self.sides += [self.side(block.audio_attn_norm, block.audio_ffn_norm, block.audio_ffn, packed, gated)] if block.dual else self.sides
        self.dual = block.dual

    def side(self, first: Any, second: Any, ffn: Any, packed: bool, gated: bool) -> "BlockSide":
        up = per_step(ffn.gate_up) if packed and gated else [joined_product([ffn.gate, ffn.up])] if gated else per_step(ffn.up)
        return BlockSide(twice(first.weight), twice(second.weight), up, per_step(ffn.down))


class BlockSide(NamedTuple):
    attn_norm: Tensor           # the weight twice, for NormBuffer
    ffn_norm: Tensor
    up: list[Product]           # of each depth step; gate and up in one
    down: list[Product]


def twice(weight: Tensor) -> Tensor:
    return torch.cat([weight.detach(), weight.detach()])


class NormBuffer:
    """Preallocated memory for x (..., D) and -x, next to each other.

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
    """Runs one column through a stack, in preallocated memory.   `c` is its StackConfig, `cache` holds its keys and values in
    the layers from `first` on, `norm` comes behind the last.
    """

    def __init__(self, blocks: Sequence[nn.Module], c: Any, cache: KVCache, first: int = 0, norm: nn.Module | None = None) -> None:
        self.c, self.act, self.norm = c, ACTIVATIONS[c.activation], None if norm is None else twice(norm.weight)
        self.layers = [Layer(block, c.packed, c.gated) for block in blocks]
        self.store = cache.store[first : first + len(self.layers)].flatten(0, 1)        # (2 layers, B, H_kv, slots, head)
        B, turning = cache.store.shape[2], c.heads + c.kv
        self.pair = NormBuffer(cache.store, B, c.dim)
        self.x = self.pair.x                                                            # input buffer that callers may write to
        self.up = cache.store.new_empty(B, (1 + c.gated) * c.ffn)
        self.halves = self.up.chunk(1 + c.gated, 1)
        self.plain = cache.store.dtype == torch.float32
        aside = turning if c.rope_theta and not (self.plain and c.rope_interleaved) else 0        # RoPE then writes beside q and k
        heads = cache.store.new_empty(B, aside + turning + c.kv, c.head)
        self.qkv, self.raw = heads[:, aside:].flatten(1), heads[:, aside : aside + turning]       # before RoPE
        self.qk, self.v = heads[:, :turning], heads[:, aside + turning :]
        self.q, self.k = self.qk.split([c.heads, c.kv], 1)
        self.kv = torch.as_strided(self.k, (2, *self.k.shape), ((aside + c.kv) * c.head, *self.k.stride()))        # k, then v
        self.groups = self.q.view(B, c.kv, -1, c.head)                                  # queries grouped by key head
        self.pairs, self.turned = (qk.unflatten(-1, (2, -1)) for qk in (self.raw, self.qk))       # (B, H', 2, head / 2)
        self.parts = [*self.pairs.unbind(2), *self.turned.unbind(2)]
        self.heads = NormBuffer(cache.store, *self.raw.shape)
        self.complex = torch.view_as_complex(self.raw.unflatten(-1, (-1, 2))) if self.plain and c.rope_interleaved else None

    def places(self, slot: int, live: int) -> Places:
        """Views of the slots of the new column, keys and values of each layer, and of all live ones, alternating."""
        return self.store.unflatten(0, (-1, 2)).select(4, slot).unbind(), self.store.narrow(3, 0, live).unbind()

    def __call__(self, x: Tensor, places: Places | RingPosition, turn: Tensor | None, mask: Tensor | None, audio: bool | Tensor = False,
                 step: int = 0) -> Tensor:
        """x (B, D) -> (B, D), overwritten by the next call

        mask (B, 1, 1, live) or None; `audio` is the side of all columns, or of each (B, 1).
        """
        # all buffers have the dtype of the weights, so autocast must not cast; a meta device has no autocast
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, places, turn, mask, audio, step)
        eps = self.c.norm_eps
        if x is not self.x:
            self.x.copy_(x)
        turn = turn if turn is None or self.complex is not None else turn.unbind(2)
        for n, layer in enumerate(self.layers):
            both = isinstance(audio, Tensor) and layer.dual
            side = layer.sides[audio is True]
            y = self.pair.norm(side.attn_norm, eps)
            if both:
                y = torch.where(audio, self.pair.norm(layer.sides[1].attn_norm, eps), y)
            layer.qkv[step].into(y, self.qkv)
            if layer.head_norm is not None:
                self.heads.x.copy_(self.raw)
                torch.mul(self.heads.norm(None, eps), layer.head_norm, out=self.raw)
            if turn is not None:
                self.turn(turn)
            layer.o[step].onto(self.x, self.attend(n, places, mask))
            if both:
                self.feed_both(layer, audio, step)
            else:
                self.feed(side, step)
        return self.x if self.norm is None else self.pair.norm(self.norm, eps)

    def attend(self, n: int, places: Places | RingPosition, mask: Tensor | None) -> Tensor:
        """Store the keys and values of the column in layer n and attend.   -> (B, H head)"""
        if isinstance(places, RingPosition):
            keys, values = self.store[2 * n], self.store[2 * n + 1]
            keys.index_copy_(2, places.slot, self.k.unsqueeze(2))
            values.index_copy_(2, places.slot, self.v.unsqueeze(2))
            return decode_attention(self.q, keys, values, places.count, self.c.window, places.first).flatten(1)
        new, seen = places
        new[n].copy_(self.kv)
        return F.scaled_dot_product_attention(self.groups, seen[2 * n], seen[2 * n + 1], attn_mask=mask).reshape(len(self.x), -1)

    def feed(self, side: BlockSide, step: int) -> None:
        """x += feed-forward network of x"""
        side.up[step].into(self.pair.norm(side.ffn_norm, self.c.norm_eps), self.up)
        if self.c.gated and self.up.is_cuda:
            y = swiglu(self.up, None, self.c.activation)
        else:
            y = self.act(self.halves[0])
            y = y.mul_(self.halves[1]) if self.c.gated else y
        side.down[step].onto(self.x, y)

    def feed_both(self, layer: Layer, audio: Tensor, step: int) -> None:
        """`feed` for a batch with text and audio columns: both networks run, each column keeps its own result."""
        before = self.x.clone()
        self.feed(layer.sides[0], step)
        text = self.x.clone()
        self.x.copy_(before)
        self.feed(layer.sides[1], step)
        self.x.copy_(torch.where(audio, self.x, text))

    def turn(self, angles: Tensor | tuple[Tensor, Tensor]) -> None:
        """RoPE of the queries and keys."""
        if self.complex is not None:                                                     # (a + ib)(cos + i sin)
            self.complex.mul_(angles)
        elif self.plain:
            (a, b, new_a, new_b), (cos, sin) = self.parts, angles
            torch.mul(self.pairs, cos.unsqueeze(2), out=self.turned)
            new_a.addcmul_(b, sin, value=-1)
            new_b.addcmul_(a, sin)
        elif self.raw.is_cuda:
            tables = tuple(table.unsqueeze(2) for table in angles)                       # (B, 1, 1, head / 2)
            self.qk.copy_(rope(self.raw.unsqueeze(2), tables, self.c.rope_interleaved).squeeze(2))
        else:
            self.qk.copy_(turned(self.raw, rotation(angles, self.c.rope_interleaved)))


class RopeTable:
    """RoPE angles by position, computed once and looked up by the fast path."""

    def __init__(self, c: Any, like: Tensor) -> None:
        self.c, self.complex = c, c.rope_interleaved and like.dtype == torch.float32
        self.device, self.table = like.device, None

    def __call__(self, positions: Tensor, below: int) -> Tensor:
        """positions (B,), all of them < below -> (B, 1, head/2) complex, or (B, 1, 2, head/2): cosines, sines"""
        self.extend(below)
        return self.table.index_select(0, positions)

    def extend(self, below: int) -> None:
        """Compute the angles of all positions < below."""
        if self.table is None or below > len(self.table):
            count = max(256, 2 * below)
            cos, sin = rope_tables(self.c.head, self.c.rope_theta, self.c.rope_scaling, torch.arange(count, device=self.device)[None])
            cos, sin = cos[0, 0][:, None], sin[0, 0][:, None]                            # (count, 1, head/2)
            self.table = torch.complex(cos, sin) if self.complex else torch.stack([cos, sin], 2)


def supports_fast_decode(blocks: Sequence[nn.Module], c: Any, dtype: torch.dtype) -> bool:
    """Whether a stack can use `ColumnStep`."""
    linears = [m for block in blocks for m in block.modules() if hasattr(m, "adapter")]
    adapted = any(m.adapter is not None and m.adapter.enabled and m.adapter.base is None for m in linears)
    packed = {id(m.weight) for m in linears if m.row_scale is not None}                  # in 8 bits
    types = {p.dtype for block in blocks for p in block.parameters() if id(p) not in packed}
    sets = any(m.weight.dim() == 3 for m in linears)
    odd = any(block.skips_audio or block.listen is not None for block in blocks) or (sets and not c.packed) or (c.packed and c.qkv_bias)
    return not adapted and not odd and types == {dtype}


def column_step(blocks: Sequence[nn.Module], c: Any, cache: KVCache, first: int = 0, norm: nn.Module | None = None) -> ColumnStep | None:
    """The fast path of a stack, or None when it must run block by block."""
    return ColumnStep(blocks, c, cache, first, norm) if supports_fast_decode(blocks, c, cache.store.dtype) else None
