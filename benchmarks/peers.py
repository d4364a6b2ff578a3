"""Small models with random weights, and the peers of bench.py: other libraries that run the same work.

    higgs, qwen, csm    transformers + PEFT: its classes, its loss, its generate
    moshi               the moshi package: LMModel with its own LoRA and the loss of moshi-finetune, LMGen

A side (measure.py) does the work once and returns its result: the loss, or all tokens. Only workloads.py and bench.py
import this file. Next: workloads.py.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["NO_TORCH_COMPILE"] = "1"                     # moshi reads it on import; compiling on a CPU only costs time

from benchmarks.measure import ON_GPU, Side
from families.csm import CSM_1B
from families.higgs import HIGGS_V2_3B
from families.moshi import MOSHI_7B
from families.moss import MOSS_9B
from families.qwen import QWEN2_5_1_5B
from layers.architecture import ModelConfig
from loss import cross_entropy_sums
from model import MultistreamLM
from options import read_json, run_config
from streams import delay, is_audio, undelay

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
NEEDS = {**dict.fromkeys(("higgs", "qwen", "csm"), ("transformers", "peft")), "moshi": ("moshi",)}
Training = tuple[nn.Module, Side]        # the network, and its loss with a gradient
WARM = 0.8                               # temperature of sampling that is not greedy


def absent(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def missing(model: str) -> str:
    """Why a model has no peer here, "" when it has one."""
    wanted = [name for name in NEEDS.get(model, ()) if absent(name)]
    if model not in NEEDS:
        return "not measured: this model has no peer"
    return f"not measured: pip install {' '.join(wanted)}" if wanted else ""


def like(model: MultistreamLM) -> Tensor:
    """A weight that has the model's device and type."""
    return model.temporal.layers[0].attn.o.weight


# ---- small models, random tokens ----

def architecture(name: str, D: int, layers: int = 4) -> ModelConfig:
    """The family small, layers of width D and 4,096 words, or with D = 0 as published. Without stop ids."""
    if name == "tiny":
        return replace(run_config(TINY).model, dropout=0.0, input_drop=0.0)
    full = {"higgs": HIGGS_V2_3B, "moshi": MOSHI_7B, "moss": MOSS_9B, "qwen": QWEN2_5_1_5B, "csm": CSM_1B}[name]
    table, moshi = replace(full.table, stop=()), name == "moshi"
    if not D:
        return replace(full, table=table)
    text = replace(table.streams[0], vocab=4096 + moshi, classes=full.table.streams[0].classes and 4096, start=4096 if moshi else -1)
    steering = {"higgs": {"audio_start": 4000, "audio_end": 4001}, **dict.fromkeys(("moss", "csm"), {"audio_start": 4000})}.get(name, {})
    stack = replace(full.temporal, dim=D, layers=layers, heads=4, kv_heads=0 if moshi else 2, head_dim=0, ffn=11 * D // 4, rope_scaling=(),
                    window=256 if moshi else 0)
    return replace(full, table=replace(table, streams=(text, *table.streams[1:]), **steering), temporal=stack, tail=min(full.tail, 1),
                   depth=full.depth and replace(full.depth, dim=D // 2, layers=2, heads=4, ffn=11 * D // 8),
                   dual_ffn=tuple(range(layers)) if full.dual_ffn else ())


def build(name: str, width: int, dtype: torch.dtype = torch.float32, checkpoint: int = 0, layers: int = 4) -> MultistreamLM:
    """A model with random weights, initialised on its device."""
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = MultistreamLM(replace(architecture(name, width, layers), checkpoint=checkpoint))
    with torch.no_grad():
        if name == "higgs":                                  # never sample the end id: random models diverge after it
            model.audio_head.weight.unflatten(0, (len(model.table.audio_out), -1))[:, model.table.streams[-1].end] = 0
    return model.to(dtype)


def frames(model: MultistreamLM, batch: int, count: int) -> Tensor:
    """Random ordinary ids.   -> (B, K, count)"""
    g = torch.Generator().manual_seed(1)
    sizes = [max(2, min(s.classes or s.vocab - 1, 1024 if s.kind == "audio" else 4000) - 2) for s in model.table.streams]
    return torch.stack([torch.randint(0, size, (batch, count), generator=g) for size in sizes], 1)


def training_batch(model: MultistreamLM, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sequential: a quarter text, then audio, -1 behind their end. Aligned: 65 % text padding at half weight, as moshi-finetune
    weighs.   -> (B, K, S) twice"""
    batch, columns = len(lengths), max(lengths)
    table, tokens = model.table, frames(model, batch, columns)
    if not table.aligned:
        for row, length in zip(tokens, lengths, strict=True):
            quarter = length // 4 if table.audio else length
            row[0, quarter:], row[1:, :quarter], row[:, length:] = -1, -1, -1
        weights = (tokens >= 0) * (table.column("classes") > 0).float()
        weights[:, 1:2] *= 1 if model.config.depth is None else len(table.audio) - 1      # CSM: as much for the first as for all others
        return tokens, weights
    padding = torch.rand(batch, columns, generator=torch.Generator().manual_seed(2)) < 0.65
    tokens[:, 0].masked_fill_(padding, min(3, table.streams[0].vocab - 1))
    tokens, weights = delay(tokens, table.delays, table.column("start")), torch.zeros(batch, len(table), columns + 1)
    for k in [*table.text_out, *table.audio_out]:
        weights[:, k, 1 + table.delays[k] :] = 1.0
    weights[:, table.audio_out[0]] *= 100.0
    weights[:, 0] *= torch.where(tokens[:, 0] == 3, 0.5, 1.0)
    return tokens, weights


def autocast(model: MultistreamLM) -> AbstractContextManager:
    """What train.py runs a forward in, and transformers' Trainer: adapters are fp32, the base may be bf16."""
    weight = like(model)
    return nullcontext() if weight.dtype == torch.float32 else torch.autocast(weight.device.type, weight.dtype)


# ---- sides of both ----

def training_side(net: nn.Module, loss: Side) -> Side:
    """Forward, backward, update. Both sides have the same optimizer."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def side() -> Tensor:
        torch.manual_seed(0)                       # both sides draw the same frames where only a share is trained
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return side


def loss_side(vocab: int, streams: int, who: str, rows: int = 4096, width: int = 256, dtype: torch.dtype = torch.float32,
              weighted: bool = True) -> Side:
    """Forward and backward through a frozen head of `streams` x `vocab`: ours, "full" logits, or of one stream without weights
    "torch" (its chunked F.linear_cross_entropy) or "liger" (CUDA)."""
    g, device = torch.Generator().manual_seed(0), "cuda" if ON_GPU else "cpu"
    h, head = torch.randn(rows, width, generator=g), torch.randn(streams * vocab, width, generator=g) / width**0.5
    targets, weights = torch.randint(0, vocab, (rows, streams), generator=g), torch.rand(rows, streams, generator=g)
    h, head, targets = h.to(device, dtype).requires_grad_(), head.to(device, dtype), targets.to(device)
    weights, scale = (weights if weighted else torch.ones_like(weights)).to(device), torch.ones(streams, device=device)

    def ours() -> Tensor:                                    # as train.py calls it
        return cross_entropy_sums(h, h[:, :0], lambda h, _: F.linear(h, head).unflatten(-1, (streams, -1)).transpose(0, 1),
                                  targets, weights, streams * vocab, scale).total

    def full() -> Tensor:
        nll = F.cross_entropy(F.linear(h, head).view(-1, vocab).float(), targets.flatten(), reduction="none")
        return (nll * weights.flatten()).sum()

    def chunked() -> Tensor:
        return F.linear_cross_entropy(h, head, targets[:, 0], reduction="sum", options=nn.LinearCrossEntropyOptions())

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, h, targets[:, 0])

    loss = {"ours": ours, "full": full, "torch": chunked, "liger": liger}[who]

    def side() -> Tensor:
        h.grad = None
        value = loss()
        value.backward()
        return torch.cat([value.detach()[None].float(), h.grad.flatten().float()])

    return side


def missing_loss(who: str) -> str:
    """Why another's fused loss is not measured here, "" when it is."""
    if who == "torch":
        return "" if hasattr(F, "linear_cross_entropy") else "not measured: this torch has no F.linear_cross_entropy, 2.13 has"
    if not ON_GPU:
        return "not measured: Liger's kernels need a CUDA device"
    return "not measured: pip install liger-kernel" if absent("liger_kernel") else ""


# ---- transformers, PEFT ----

def transformers_model(folder: Path, model: MultistreamLM) -> nn.Module:
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, options = transformers.AutoModelForCausalLM, {}
    if model.table.audio:
        kind, options = transformers.HiggsAudioV2ForConditionalGeneration, {"use_text_head": True}
    if model.config.depth is not None:                       # a small codec, replaced below
        kind, options = transformers.CsmForConditionalGeneration, {"codec_config": transformers.MimiConfig(num_filters=2)}
    net = kind.from_pretrained(folder, dtype=like(model).dtype, **options)
    if model.config.depth is not None:
        del net.codec_model                                  # "waveforms" (1, Q, T) hold codes already: neither side encodes
        net.codec_model = SimpleNamespace(encode=lambda wave: SimpleNamespace(audio_codes=wave), get_audio_codes_mask=lambda mask: mask)
    return net.to(like(model).device)


def transformers_training(folder: Path, model: MultistreamLM, tokens: Tensor, weights: Tensor) -> Training:
    """PEFT around transformers, with the loss of its own class. Codes (B, n, Q) are passed separately; all padded."""
    from peft import PeftModel
    net = PeftModel.from_pretrained(transformers_model(folder, model), folder / "adapter", is_trainable=True).train()
    if model.config.checkpoint:
        net.enable_input_require_grads()                     # recomputation needs inputs that require a gradient
        net.gradient_checkpointing_enable({"use_reentrant": False})
    real = (tokens >= 0).any(1)
    given: dict[str, Any] = {"input_ids": tokens[:, 0].clamp(min=0), "labels": tokens[:, 0].masked_fill(weights[:, 0] == 0, -100)}
    given |= {} if bool(real.all()) else {"attention_mask": real.long()}
    audio, share = is_audio(tokens, model.table), model.config.depth is not None
    if model.table.audio:
        codes = [row[:, at].T for row, at in zip(tokens[:, model.table.audio], audio, strict=True)]
        codes = nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-100)
        given["input_ids"].masked_fill_(audio, net.config.audio_token_id)
    if share:                                                # CSM: labels say which frames train the depth transformer, below
        given |= {"input_values": codes.clamp(min=0).mT, "input_values_cutoffs": audio.sum(1)[:, None]}
    elif model.table.audio:
        given |= {"audio_input_ids": codes.clamp(min=0), "audio_labels": codes, "audio_input_ids_mask": codes[..., 0] >= 0}
    half, rows, S = autocast(model), audio[:, 1:].flatten().nonzero()[:, 0], tokens.shape[2]

    def loss() -> Tensor:
        if share:
            given["labels"] = torch.full_like(audio, -100, dtype=torch.long).masked_fill_(audio, -101)
            chosen = model.depth_rows(rows)
            given["labels"].view(-1)[chosen + chosen // (S - 1) + 1] = net.config.audio_token_id
        with half:
            return net(**given, use_cache=False).loss

    return net, loss


def transformers_decoding(net: nn.Module, model: MultistreamLM, prompt: Tensor, top_k: int) -> Side:
    """Greedy where top_k is 0. A hook calls `tick` after every column."""
    ids = {"input_ids": prompt[:, 0], "attention_mask": torch.ones_like(prompt[:, 0])}
    rules = {"do_sample": True, "temperature": WARM, "top_k": top_k} if top_k else {"do_sample": False}
    if model.config.depth is not None:
        rules |= {f"depth_decoder_{name}": rule for name, rule in rules.items()}

    def side(columns: int, tick: Callable[[], None] | None = None) -> Tensor:
        hook = net.register_forward_hook(lambda *_: tick and tick())
        with torch.inference_mode():
            made = net.generate(**ids, **rules, max_new_tokens=columns, eos_token_id=None, pad_token_id=0)
        hook.remove()
        made = made.mT if model.table.audio else made[:, None, prompt.shape[2] :]
        return undelay(made, model.table.delays[1:]) if any(model.table.delays) else made

    return side


# ---- moshi, moshi-finetune ----

def moshi_model(folder: Path, model: MultistreamLM, adapter: Path | None = None) -> nn.Module:
    from moshi.models.loaders import get_moshi_lm
    about = read_json((adapter or folder) / "config.json")
    about.pop("model_type")
    lora = adapter and adapter / "lora.safetensors"
    return get_moshi_lm(folder / "model.safetensors", about, like(model).device, like(model).dtype, lora,
                        lm_kwargs_overrides={"gradient_checkpointing": model.config.checkpoint > 0})


def weighted_mean(logits: Tensor, target: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """moshi-finetune's compute_loss_with_mask."""
    weight = (mask.float() * factor).flatten()
    nll = F.cross_entropy(logits.flatten(0, -2).float(), torch.where(mask, target, 0).flatten(), reduction="none")
    return torch.where(weight > 0, nll * weight, 0.0).sum() / weight.sum()


def moshi_training(folder: Path, model: MultistreamLM, tokens: Tensor, weights: Tensor, codec: bool = False) -> Training:
    """Weights: text padding 0.5, first codebook 100. Frames outside the grid have no loss. With `codec` a
    random Mimi encodes both channels of each recording in every step, one after the other, as moshi-finetune's loader does."""
    net, table = moshi_model(folder, model, folder / "adapter").train(), model.table
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    frames = undelay(F.pad(tokens, (0, max(table.delays)), value=0), table.delays)
    text, audio = frames[:, :1], frames[:, table.audio_out]
    factors = torch.where(text == 3, 0.5, 1.0), torch.ones(len(table.audio_out), 1, device=tokens.device)
    factors[1][0] = 100.0

    if codec:
        from moshi.models.loaders import get_mimi
        mimi = get_mimi(None, device=tokens.device)
        stereo = torch.randn(2, 1, frames.shape[-1] * mimi.frame_size, device=tokens.device)

    def loss() -> Tensor:
        with torch.no_grad():
            for _ in range(len(tokens) * codec):
                mimi.encode(stereo)
        out = net(frames)
        return weighted_mean(out.text_logits, text, out.text_mask, factors[0]) + weighted_mean(out.logits, audio, out.mask, factors[1])

    return net, loss


def moshi_decoding(net: nn.Module, user: Tensor, top_k: int) -> Side:
    """user (B, 8, T): codes of the other speaker while the model generates. Greedy if top_k is 0."""
    from moshi.models import LMGen
    rules = {"temp": WARM, "temp_text": WARM, "top_k": top_k, "top_k_text": top_k} if top_k else {"use_sampling": False}
    generator = LMGen(net, **rules)

    def side(columns: int, tick: Callable[[], None] | None = None) -> Tensor:
        made: list[Tensor] = []
        with generator.streaming(len(user)):
            for t in range(columns):
                frame = generator.step(user[..., t : t + 1])
                made += [] if frame is None else [frame]
                if tick:
                    tick()
        return torch.cat(made, -1)

    return side
