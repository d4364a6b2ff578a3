"""One transformer for every family: K streams are embedded and summed, read by a temporal transformer over columns,
and written by parallel heads or by a depth transformer over the codebooks of a column.

    tokens (B, K, S) --embed, sum--> x (B, S, D) --temporal--> h (B, S, D) --+-- text_head ------> (B, S, V_text)
                                                                             +-- audio_head -----> (B, Q, S, V_audio)
                                                                             +-- or depth(h, tokens of the next column)

    B batch   S columns   K streams   Q predicted codebooks   D width   H heads   V vocabulary   N flat rows
    R LoRA rank   T codec frames   W waveform samples   F mel or feature bins

A column is an audio column when any of its audio rows is >= 0; dual FFNs and the audio tail act on those columns.
`model(tokens)` reads columns 0..S-2 and predicts columns 1..S-1. Published architectures are constants in families/.
Sources: Llama (arXiv:2302.13971), RoPE (2104.09864), Moshi (2410.00037), Higgs Audio v2, MOSS-Speech (2510.00499).
Next: loss.py. One file because it is read as one: every switch is next to the block that it changes.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import KVCache, attend
from kernels.choice import device_constant
from kernels.cross_entropy import Head
from kernels.decode import ColumnStep, RingPosition, RopeTable, column_step, supports_fast_decode
from kernels.depth_attention import depth_attention
from kernels.embed_sum import embed_row, embed_sum
from kernels.lora_linear import linear
from kernels.recompute import Recompute, recomputed
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.route import route
from kernels.swiglu import ACTIVATIONS, swiglu
from layers.architecture import ModelConfig, StackConfig
from layers.batch_plan import Context, Plan, graph_context, make_plan, temporal_context
from layers.conditioning import VoiceAttention, VoiceConditioner, input_embeddings
from layers.contrastive import contrastive_pairs, info_nce
from layers.depth import Depth, Parts, PrefixDepth, depth_transformer
from layers.fusion import Affine, Projector, TextTower
from loss import Sums, cross_entropy_sums
from streams import is_audio


class Linear(nn.Module):
    """y = x W^T + b. With `sets`, one W per depth step: x (n, N, in) holds the inputs of the steps in the slice `step`, in order.

    `adapter` is the LoRA module that lora.py adds; it then computes the whole product.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, sets: int = 0, schedule: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*([sets] if sets else []), outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.schedule = schedule
        self.adapter: nn.Module | None = None
        self.register_buffer("row_scale", None)        # scale of each row of a weight that int8_base.quantize stores in 8 bits

    def pick(self, parameter: Tensor, step: slice) -> Tensor:
        """Select the weight sets of the depth steps in a slice."""
        return parameter[device_constant(self.schedule[step], parameter.device)] if self.schedule else parameter[step]

    def forward(self, x: Tensor, step: slice | None = None) -> Tensor:
        def pick(p: Tensor | None) -> Tensor | None:
            return p if step is None or p is None else self.pick(p, step)

        weight, row_scale = pick(self.weight), pick(self.row_scale)
        if self.adapter is None:
            return linear(x, weight, self.bias, row_scale)
        return self.adapter(x, weight, self.bias, pick, row_scale)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32.   (..., D) -> (..., D)"""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None, other: "RMSNorm | None" = None,
                where: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With `residual` -> the norm of x + residual, and that sum. With `other`: rows where `where` (...,) is true use its weight."""
        return rms_norm(x, self.weight, self.eps, residual, other and other.weight, where)


# ---- blocks ----

class Attention(nn.Module):
    """Grouped-query causal self-attention.   (B, S, D) -> (B, S, D), or (steps, N, D) in the depth transformer"""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        self.c = c
        widths = [c.heads * c.head, c.kv * c.head, c.kv * c.head]
        options = {"sets": len(set(c.schedule)) or c.steps, "schedule": c.schedule}
        if c.packed:
            self.qkv = Linear(c.dim, sum(widths), c.qkv_bias, **options)
        else:
            self.q, self.k, self.v = (Linear(c.dim, w, c.qkv_bias, **options) for w in widths)
        self.widths = widths
        self.o = Linear(widths[0], c.dim, **options)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head, c.norm_eps), RMSNorm(c.head, c.norm_eps)

    def forward(self, x: Tensor, context: Context, layer: int, mask: Tensor | None) -> Tensor:
        c, step = self.c, context.step
        if c.packed:
            q, k, v = self.qkv(x, step).split(self.widths, dim=-1)
        else:
            q, k, v = self.q(x, step), self.k(x, step), self.v(x, step)
        if c.steps and context.cache is None:              # the depth transformer attends over its first axis, the steps
            q, k, v = (t.unflatten(-1, (-1, c.head)) for t in (q, k, v))
            q, k = (self.q_norm(q), self.k_norm(k)) if c.qk_norm else (q, k)
            return self.o(depth_attention(q, k, v).flatten(-2), step)
        order = (1, 2, 0, 3) if c.steps else (0, 2, 1, 3)
        q, k, v = (t.unflatten(-1, (-1, c.head)).permute(order) for t in (q, k, v))   # -> (B, H, S, head)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = (rope(t, context.rope, c.rope_interleaved) for t in (q, k))
        if context.cache is not None:
            k, v = context.cache.update(layer, k, v)
        return self.o(attend(q, k, v, mask).permute((2, 0, 1, 3) if c.steps else (0, 2, 1, 3)).flatten(-2), step)


class FeedForward(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)).   (..., D) -> (..., D)"""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        self.c = c
        options = {"sets": len(set(c.schedule)) or c.steps, "schedule": c.schedule}
        if c.gated and c.packed:
            self.gate_up = Linear(c.dim, 2 * c.ffn, **options)
        else:
            if c.gated:
                self.gate = Linear(c.dim, c.ffn, **options)
            self.up = Linear(c.dim, c.ffn, **options)
        self.down = Linear(c.ffn, c.dim, **options)

    def forward(self, x: Tensor, step: slice | None = None) -> Tensor:
        if not self.c.gated:
            return self.down(ACTIVATIONS[self.c.activation](self.up(x, step)), step)
        parts = (self.gate_up(x, step), None) if self.c.packed else (self.gate(x, step), self.up(x, step))
        return self.down(recomputed(swiglu, *parts, self.c.activation), step)


class Block(nn.Module):
    """Pre-norm attention and feed-forward. `dual`: audio columns have their own norms and feed-forward network.

    `skips_audio` (Higgs fast-forward): audio columns pass the block unchanged, and text columns do not attend to them.
    """

    def __init__(self, c: StackConfig, dropout: float = 0.0, dual: bool = False, skips_audio: bool = False, listens: bool = False) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.dim, c.norm_eps), Attention(c)
        self.listen = VoiceAttention(c.dim, c.heads) if listens else None
        self.ffn_norm, self.ffn = RMSNorm(c.dim, c.norm_eps), FeedForward(c)
        self.dropout, self.dual, self.skips_audio = dropout, dual, skips_audio
        if dual:
            self.audio_attn_norm, self.audio_ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
            self.audio_ffn = FeedForward(c)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        if self.dual:
            normed = recomputed(self.attn_norm, x, None, self.audio_attn_norm, context.audio)
        else:
            normed = recomputed(self.attn_norm, x)
        y = self.drop(self.attn(normed, context, layer, context.hidden if self.skips_audio else context.mask))
        if self.listen is not None:
            x = x + y
            y = self.listen(x, context.voice)
        if self.dual:
            h = x + y
            h = h + self.routed(h.flatten(0, 1), context.plan).view_as(h)
        else:
            normed, h = self.ffn_norm(y, x)
            h = h + self.drop(self.ffn(normed, context.step))
        return torch.where(context.audio[..., None], x, h) if self.skips_audio else h

    def routed(self, h: Tensor, plan: Plan) -> Tensor:
        """Run text columns through one network and audio columns through the other.   (N, D)

        In training an empty side still runs, because DDP needs a gradient of every parameter on every rank.
        """
        rows = h if plan.order is None else route(h, plan.order, plan.back)
        text, audio = rows[: plan.texts], rows[plan.texts :]
        if plan.order is None and not torch.is_grad_enabled():
            return self.ffn(self.ffn_norm(text)) if plan.texts else self.audio_ffn(self.audio_ffn_norm(audio))
        y = torch.cat([self.ffn(recomputed(self.ffn_norm, text)), self.audio_ffn(recomputed(self.audio_ffn_norm, audio))])
        return self.drop(y if plan.order is None else route(y, plan.back, plan.order))

    def drop(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.dropout or not self.training or torch.compiler.is_compiling():
            return F.dropout(x, self.dropout, self.training)
        bits, hidden = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(), round(32768 * self.dropout)      # four of a draw:
        mask = bits.view(torch.int16)[: x.numel()].bitwise_and_(32767) >= hidden                  # torch has one thread draw each
        return x * mask.view(x.shape).to(x.dtype).mul_(32768 / max(32768 - hidden, 1))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, context: Context, first: int = 0, level: int = 0) -> Tensor:
    """Run the blocks in order. `level` = what backward recomputes: 1 cheap outputs, 3 also every second block, 4 every block."""
    level = level if torch.is_grad_enabled() and context.cache is None else 0
    for layer, block in enumerate(blocks, first):
        if level == 4 or level == 3 and layer % 2:
            x = checkpoint(block, x, context, layer, use_reentrant=False)
        else:
            with Recompute(level > 0):
                x = block(x, context, layer)
    return x


class Temporal(nn.Module):
    """The transformer over columns, optionally with a text tail and an audio tail.   x (B, S, D) -> text and audio states (B, S, D)"""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c, s = c, c.temporal
        duals = [n in c.dual_ffn for n in range(s.layers)]
        self.layers = nn.ModuleList(Block(s, c.dropout, d, c.fast_forward and not d, c.voice > 0) for d in duals)
        if c.tail:
            self.text_tail, self.audio_tail = (nn.ModuleList(Block(s, c.dropout) for _ in range(c.tail)) for _ in range(2))
            self.text_norm, self.audio_norm = RMSNorm(s.dim, s.norm_eps), RMSNorm(s.dim, s.norm_eps)
        else:
            self.norm = RMSNorm(s.dim, s.norm_eps)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if context.fast:
            return self.decode_column(x[:, 0], context)
        h = run_blocks(self.layers, x, context, 0, self.c.checkpoint)
        if not self.c.tail:
            h = self.norm(h)
            return h, h
        n = len(self.layers)
        text = run_blocks(self.text_tail, h, context, n, self.c.checkpoint)
        audio = run_blocks(self.audio_tail, h, context, n + self.c.tail, self.c.checkpoint)
        return self.text_norm(text), self.audio_norm(audio)

    def decode_column(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The fast path of `forward` for one column.   x (B, D) -> text and audio states (B, 1, D)"""
        cache, (trunk, *tails) = context.cache, context.cache.fast
        if cache.counter is None:
            own, *others = (part.places(cache.slots.start, cache.live) for part in cache.fast)
        else:
            own = RingPosition(cache.counter[:1] % cache.capacity, cache.counter + 1, cache.padding)
            others = [own] * len(tails)
        h = trunk(x, own, context.turn, context.mask, bool(cache.side) if context.audio is None else context.audio)
        h = [t(h, places, context.turn, context.mask)[:, None] for t, places in zip(tails, others, strict=True)] or [h[:, None]]
        return h[0], h[-1]

    def parts(self) -> list[tuple[nn.ModuleList, int, RMSNorm | None]]:
        """The shared layers, then the tails: (blocks, number of the first block, norm after the last block)."""
        c, n = self.c, len(self.layers)
        tails = [(self.text_tail, n, self.text_norm), (self.audio_tail, n + c.tail, self.audio_norm)] if c.tail else []
        return [(self.layers, 0, None if c.tail else self.norm), *tails]

    def has_fast_decode(self) -> bool:
        """Whether `decode_column` supports all blocks."""
        return all(supports_fast_decode(blocks, self.c.temporal, self.layers[0].attn_norm.weight.dtype) for blocks, *_ in self.parts())

    def decode_steps(self, cache: KVCache) -> list[ColumnStep] | None:
        """The step that `decode_column` runs for each of `parts`; None if decoding has to run block by block."""
        steps = [column_step(blocks, self.c.temporal, cache, *rest) for blocks, *rest in self.parts()]
        return None if None in steps else steps


class Embedding(nn.Module):
    """Sum of one embedding per row; -1 adds exactly zero.   ids (B, n, S) -> (B, S, D)

    The tables of all rows are stacked in one `weight`; `offsets` are the first rows of the tables.
    """

    def __init__(self, vocabularies: list[int], dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(vocabularies), dim))
        self.offsets = tuple(sum(vocabularies[:n]) for n in range(len(vocabularies)))

    def row(self, n: int, ids: Tensor) -> Tensor:
        """Embed one row.   ids (...) -> (..., D)"""
        return embed_row(ids, self.weight, self.offsets[n])

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[2] == 1 and self.weight.dtype == torch.float32 and not torch.is_grad_enabled():
            vectors = F.embedding((ids[..., 0] + device_constant(self.offsets, ids.device)).clamp_(min=0), self.weight)
            return torch.bmm(torch.ge(ids, 0, out=vectors.new_empty(ids.shape)).mT, vectors)         # one column: (B, 1, n) (B, n, D)
        return embed_sum(ids, self.weight, self.offsets)


PARTS = Parts(Block, Linear, RMSNorm, Embedding, run_blocks)          # the modules that layers/depth.py uses


# ---- the model ----

class MultistreamLM(nn.Module):
    """A speech-text language model over the grid of its stream table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.table = config, config.table
        streams, D = self.table.streams, config.temporal.dim
        self.embed, fusion = input_embeddings(config, Embedding, Linear), config.fusion
        self.temporal = Temporal(config)
        self.tower, self.remembered, spoken = None, None, D
        if fusion is not None:
            self.tower = TextTower(MultistreamLM(fusion.tower), fusion.rate, (self.table.pad, self.table.epad))
            spoken = fusion.tower.temporal.dim
            self.text_projector = Projector(fusion.text, (spoken, D), fusion.hidden, spoken, fusion.dropout, fusion.split_norm)
            self.feed_text = Affine(spoken, D, bias=False, start=0.0) if fusion.feed_text else None
        if self.table.text_out:
            self.text_head = Linear(spoken, streams[self.table.text_out[0]].classes)
        self.voice = VoiceConditioner(config.voice, D, Linear, config.voice_places) if config.voice else None
        if config.extra_heads:
            self.extra_head = Linear(D, config.extra_classes, sets=config.extra_heads).requires_grad_(False)      # no loss reaches it
        prefix = config.depth is not None and config.depth.prefix
        if self.table.audio_out and (config.depth is None or prefix):                # with a prefix, of the first codebook alone
            self.audio_head = Linear(D, sum(streams[i].classes for i in self.table.audio_out[: 1 if prefix else None]))
        if config.depth is not None:
            self.depth = depth_transformer(PARTS, config)
        self.tie()
        self.reset_parameters()

    def tie(self) -> None:
        """Let tied heads use the weights of their embeddings."""
        for head in self.config.tied_heads:
            getattr(self, head).weight = self.embed[head.removesuffix("_head")].weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MultistreamLM":
        self.__dict__.pop("replay", None)              # CUDA graphs hold the old addresses of the weights (cuda_graphs.py)
        if self.tower is not None:                     # not a submodule, but moved and cast with the model
            self.tower.body._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated normal with std 1/sqrt(last axis); outputs of residual branches are divided by sqrt(2 layers)."""
        started = {id(p) for module in self.modules() if isinstance(module, (Affine, Projector)) for p in module.parameters()}
        for name, p in self.named_parameters():
            if p.is_meta or p.dim() < 2 or id(p) in started:
                continue
            std = p.shape[-1] ** -0.5
            if name.endswith(("attn.o.weight", "ffn.down.weight")):
                std /= math.sqrt(2 * self.config.temporal.layers)
            nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)

    # ---- teacher forcing ----

    def forward(self, tokens: Tensor, weights: Tensor | None = None, positions: Tensor | None = None,
                segments: Tensor | None = None, voice: Tensor | None = None, speakers: Tensor | None = None, scale: Tensor | None = None,
                plan: Plan | None = None, z_loss: float = 0.0) -> Sums | tuple[Tensor | None, Tensor | None]:
        """Predict columns 1..S-1 from columns 0..S-2.

        tokens (B, K, S) int64, weights (B, K, S) or None, positions and segments (B, S) of packed rows or None; `voice`
        (B, n, D) is the output of self.voice.
        Without weights -> logits: text (B, S-1, V_text) or None, audio (B, Q, S-1, V_audio) or None.
        With weights -> Sums: weighted nll, weight, hits and count of every stream, each (K,), and nll of every position, B * (S-1);
        with speakers (B, S) of packed rows also the contrastive loss.
        With `scale` (K,) of each stream, only `total` carries the gradient; it is computed in the forward pass, which takes less
        memory and one matmul less. `plan` is batch_plan.make_plan of the batch; made on the CPU it avoids a device sync.
        """
        B, K, S = tokens.shape
        assert len(self.table) == K, f"{K} rows for a table of {len(self.table)}"
        inputs, targets = tokens[..., :-1], tokens[..., 1:]
        cut = [None if t is None else t[:, :-1] for t in (positions, segments)]
        if plan is None and weights is not None:
            plan = make_plan(self.config, tokens, weights, positions, segments)
        h_text, h_audio = self.hidden(inputs, *cut, voice=voice, plan=plan)
        if weights is not None:
            sums = self.sums(h_text, h_audio, targets, weights[..., 1:], plan, scale, z_loss)
            if speakers is not None:
                found = contrastive_pairs(inputs, weights[..., :-1], cut[1], speakers[:, :-1], self.table)
                sums.contrast, sums.paired = info_nce(h_audio, found), found.count
            return sums
        text = self.text_head(h_text) if self.table.text_out else None
        audio = None
        if self.table.audio_out:
            flat = self.audio_logits(h_audio.flatten(0, 1), self.depth_inputs(targets))     # -> (Q, N, V)
            audio = flat.unflatten(1, (B, S - 1)).transpose(0, 1)                           # -> (B, Q, S-1, V)
        return text, audio

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None,
               cache: KVCache | None = None, voice: Tensor | None = None, plan: Plan | None = None,
               inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the temporal transformer.   tokens (B, K, S) -> states for the text and the audio heads, (B, S, D) each

        `inputs` (B, n, D) stand for the embeddings of the first n columns.
        """
        if self.training and self.config.text_drop:
            kept, texts = self.keep_inputs(tokens, self.config.text_drop)[:, None] > 0, len(self.table.text)
            tokens = torch.cat([torch.where(kept, tokens[:, :texts], -1), tokens[:, texts:]], 1)
        if self.tower is not None:
            return self.fused(tokens, positions, segments, cache, plan)
        fast = cache is not None and cache.takes_fast_path(tokens.shape[2])
        if fast and cache.counter is not None:
            context = graph_context(self.config, positions, cache)
        else:
            context = temporal_context(self.config, None if fast else is_audio(tokens, self.table), positions, segments, cache, plan)
        if fast and cache.side is None and self.config.dual_ffn:                # the batch has text and audio columns at once
            context.audio = is_audio(tokens, self.table)
        voice = cache.voice if voice is None and cache is not None else voice
        context.voice = self.voice.unknown_voice(len(tokens)) if voice is None and self.voice is not None else voice
        x = self.embed_tokens(tokens, cache.side if fast and not self.table.aligned else None)
        if inputs is not None:
            x = torch.cat([inputs.to(x), x[:, inputs.shape[1] :]], 1)
        return self.temporal(x, context)

    def fused(self, tokens: Tensor, positions: Tensor | None, segments: Tensor | None, cache: KVCache | None,
              plan: Plan | None) -> tuple[Tensor, Tensor]:
        """`hidden` with a text tower: projected for the text head (B, S, Dt), concatenated for the depth steps (B, S, Dt + D)."""
        def towers(tokens: Tensor, positions: Tensor | None = None, segments: Tensor | None = None, plan: Plan | None = None) -> Tensor:
            context = temporal_context(self.config, is_audio(tokens, self.table), positions, segments, cache, plan)
            x = self.embed_tokens(tokens)
            if self.feed_text is not None:
                x = x + self.feed_text(self.tower.embed(tokens[:, 0]))
            spoken = self.tower(tokens[:, 0], positions, segments, cache and cache.tower)
            return torch.cat([spoken, self.temporal(x, context)[0]], -1)
        learning = self.training and self.remembered is not None and cache is None
        h = self.remembered(tokens, segments, towers) if learning else towers(tokens, positions, segments, plan)
        return self.text_projector(h), h

    def embed_tokens(self, tokens: Tensor, side: bool | None = None) -> Tensor:
        """Sum the embeddings of a column.   (B, K, S) -> (B, S, D); `side`: True = audio columns only, False = text columns only"""
        parts = []
        if self.table.audio and side is not False:
            heard = tokens[:, self.table.lead :]
            if self.training and self.config.input_drop:                         # what is only read, the user's codes, is not hidden
                hidden = self.keep_inputs(tokens, self.config.input_drop)[:, None] == 0
                heard = heard.masked_fill(hidden & (self.table.column("classes")[self.table.lead :].to(heard.device) > 0), -1)
            parts.append(self.embed["audio"](heard))
        if "text" in self.embed and not (side and parts):
            parts.append(self.embed["text"](tokens[:, : len(self.table.text)]))
        parts += [self.embed[f"condition_{self.table.streams[i].name}"](tokens[:, i]) for i in self.table.conditions]
        return sum(parts[1:], parts[0])

    def keep_inputs(self, tokens: Tensor, most: float) -> Tensor:
        """A random mask of input columns for each item of the batch, with a share of zeros up to `most`; targets stay.   -> (B, S)

        Without it, a model trained on a small data set recognises the clip from its past codes and ignores the text.
        """
        B, _, S = tokens.shape
        share = torch.rand(B, 1, device=tokens.device) * most
        return (torch.rand(B, S, device=tokens.device) >= share).float()

    def depth_inputs(self, targets: Tensor) -> Tensor:
        """The tokens that the depth steps read: text row, codebooks 0..Q-2 of the predicted column.   (B, K, S) -> (N, Q)"""
        rows = [*self.table.text[: self.depth.texts], *self.table.audio_out[:-1]] if self.config.depth is not None else []
        return targets[:, device_constant(tuple(rows), targets.device)].transpose(1, 2).flatten(0, 1)

    def audio_logits(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Logits of every predicted codebook.   h (N, D), tokens (N, Q), which only the depth steps read -> (Q, N, V)"""
        Q, depth = len(self.table.audio_out), self.config.depth
        if depth is None:
            return self.audio_head(h).unflatten(-1, (Q, -1)).transpose(0, 1)
        if not depth.prefix:
            return self.depth.head(self.depth(h, tokens), slice(0, Q))
        first, rest = self.audio_head(h)[None], self.depth_logits(h, tokens)
        V = max(first.shape[-1], rest.shape[-1])                                # ids that a smaller head does not have get -inf
        return torch.cat([F.pad(x, (0, V - x.shape[-1]), value=-torch.inf) for x in (first, rest)])

    def codebook_logits(self, k: int, h: Tensor, token: Tensor, cache: KVCache, known: bool = False) -> Tensor:
        """Logits of codebook k of one column, for sampling codebook by codebook.   h (B, D), token as in Depth.embed -> (B, V)"""
        if not self.config.depth.prefix:
            return self.depth.step(k, h, token, cache, known)
        logits = self.depth.step(k, h, token, cache, self.embed["audio"])
        return logits if k else self.audio_head(h)

    def depth_logits(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the codebooks that a prefix depth transformer predicts.   h (N, D), tokens (N, Q - 1) -> (Q - 1, N, V)"""
        return self.depth.head(self.depth(h, tokens, self.embed["audio"]), slice(0, self.config.depth.steps - 1))

    def extra_odds(self, h: Tensor) -> Tensor:
        """Probabilities of the extra heads.   text states (B, S, D) -> (B, heads, S, classes)"""
        logits = self.extra_head(h.flatten(0, 1).expand(self.config.extra_heads, -1, -1), slice(0, self.config.extra_heads))
        return logits.unflatten(1, h.shape[:2]).transpose(0, 1).float().softmax(-1)

    def sums(self, h_text: Tensor, h_audio: Tensor, targets: Tensor, weights: Tensor, plan: Plan, scale: Tensor | None,
             z_loss: float) -> Sums:
        """Loss sums per stream; the heads only run at positions with a target.   targets, weights (B, K, S)"""
        zeros, parts = torch.zeros(4, len(self.table), device=weights.device), []
        tables = self.embed["audio"] if self.table.audio else None
        total = Sums(*zeros, places=weights.new_zeros(targets[:, 0].numel()))
        jobs = [(self.table.text_out, h_text, at, self.text_head, lambda h, _: self.text_head(h)[None]) for at in plan.text_rows]
        out, at, prefix = self.table.audio_out, plan.audio_rows, self.config.depth is not None and self.config.depth.prefix
        if out and prefix:                                                       # the first codebook has a head of its own
            jobs.append((out[:1], h_audio, at, self.audio_head, lambda h, _: self.audio_head(h)[None]))
            out, at = out[1:], self.depth_rows(at)
        if out:
            jobs.append((out, h_audio, at, *self.audio_part(scale is not None)))
        for rows, h, at, module, head in jobs:
            streams = device_constant(tuple(rows), targets.device)
            t, w = (x[:, streams].transpose(1, 2).flatten(0, 1)[at] for x in (targets, weights))     # -> (N, Q)
            if rows == self.table.text_out and self.table.timing.lead > 0:       # words are fed: whether one begins is predicted
                begins = targets[:, self.table.text[-1]].flatten()[at, None] == self.table.epad
                t = torch.where(begins, self.table.epad, self.table.pad)
            x, inputs = h.flatten(0, 1)[at], self.depth_inputs(targets)[at]
            if prefix and rows is out and len(at) < len(plan.audio_rows):       # scale up the sampled share: same sums in expectation
                w = w * (len(plan.audio_rows) / len(at))
            if self.config.depth is not None and module is self.depth.head:
                x = self.depth(x, inputs, tables, 4 if self.config.checkpoint >= 2 else self.config.checkpoint).transpose(0, 1)
            logits, trained = sum(self.table.streams[k].classes for k in rows), [p for p in module.parameters() if p.requires_grad]
            if isinstance(module, (Depth, PrefixDepth)):                         # its activations can be larger than its logits
                trained += [p for p in tables.parameters() if p.requires_grad and self.config.depth_tied]
                logits = max(logits, 4 * self.config.depth.steps * module.c.layers * module.c.dim)
            parts.append(cross_entropy_sums(x, inputs, head, t, w, logits, None if scale is None else scale[streams], z_loss, trained))
            total = total.add(rows, parts[-1], at)
        if len(plan.text_rows) > 1:
            total.quiet = parts[1].stacked()[:, 0]
        return total

    def depth_rows(self, at: Tensor) -> Tensor:
        """The positions on which a prefix depth transformer is trained in this batch: a new random share each time, or all."""
        if not self.training or self.config.depth_share == 1 or len(at) < 2:
            return at
        count = max(1, round(self.config.depth_share * len(at)))
        return at[torch.randperm(len(at), device=at.device)[:count].sort().values]

    def audio_part(self, scaled: bool) -> tuple[nn.Module, Head]:
        """The module that computes audio logits for a chunk of rows: the head; from checkpoint level 2 on the whole depth transformer."""
        if self.config.depth is None:
            return self.audio_head, self.audio_logits
        sharded = scaled and hasattr(self.depth.layers[0], "unshard")           # FSDP gathers a block for one pass, not for many chunks
        if (self.config.checkpoint >= 2 or self.config.depth.prefix) and not sharded:
            return self.depth, self.depth_logits if self.config.depth.prefix else self.audio_logits
        return self.depth.head, lambda x, _: self.depth.head(x.transpose(0, 1), slice(0, x.shape[1]))

    # ---- sampling, one column at a time ----

    def cache(self, batch: int, columns: int, chunk: int = 0) -> KVCache:
        """Allocate the static KV cache for `columns` columns, at most `chunk` of them read at once; 0 = as the prefill does."""
        c, weight = self.config, self.temporal.layers[0].attn_norm.weight
        capacity = min(columns, c.temporal.window + (chunk or c.temporal.chunk)) if c.temporal.window else columns
        cache = KVCache(c.temporal.layers + 2 * c.tail, batch, c.temporal.kv, capacity, c.temporal.head, weight)
        cache.fast, cache.rope = self.temporal.decode_steps(cache), RopeTable(c.temporal, weight)
        cache.tower = self.tower and self.tower.cache(batch, columns)
        return cache

    def weights(self) -> dict[str, Tensor]:
        """The state dict with each shared tensor only once."""
        tensors = self.state_dict()
        for head in self.config.tied_heads:
            tensors.pop(f"{head}.weight")
        return tensors

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())
