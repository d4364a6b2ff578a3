"""Small models with random weights, and what others do with them: the sides that bench.py measures us against.

    higgs, qwen    transformers + PEFT: its classes, its loss, its generate
    moshi          the moshi package: LMModel with its own LoRA and the loss of moshi-finetune, LMGen

A side is a function that does the work once and returns what it computed: the loss, or all greedy tokens. Only bench.py
imports this file.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"NO_TORCH_COMPILE": "1", "NO_CUDA_GRAPH": "1"}           # nobody compiles; moshi reads them on import
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loss import cross_entropy_sums
from model import HIGGS_V2_3B, MOSHI_7B, MOSS_9B, QWEN2_5_1_5B, ModelConfig, MultistreamLM
from options import read_json, run_config
from streams import delay, is_audio, undelay

TINY = Path(__file__).parent / "configs" / "tiny.py"
NEEDS = {"higgs": ("transformers", "peft"), "qwen": ("transformers", "peft"), "moshi": ("moshi",)}
Side = Callable[[], Tensor]
Training = tuple[nn.Module, Side]        # the network, and its loss with a gradient


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

def architecture(name: str, D: int) -> ModelConfig:
    """The family small, 4 layers of width D and 4,096 words, or with D = 0 as published. Nothing ends a text early."""
    if name == "tiny":
        return replace(run_config(TINY).model, dropout=0.0, input_drop=0.0)
    full, moshi = {"higgs": HIGGS_V2_3B, "moshi": MOSHI_7B, "moss": MOSS_9B, "qwen": QWEN2_5_1_5B}[name], name == "moshi"
    table = replace(full.table, stop=())
    if not D:
        return replace(full, table=table)
    text = replace(table.streams[0], vocab=4096 + moshi, classes=4096, start=4096 if moshi else -1)
    steering = {"higgs": {"audio_start": 4000, "audio_end": 4001}, "moss": {"audio_start": 4000}}.get(name, {})
    stack = replace(full.temporal, dim=D, layers=4, heads=4, kv_heads=0 if moshi else 2, head_dim=0, ffn=11 * D // 4, rope_scaling=(),
                    window=256 if moshi else 0)
    return replace(full, table=replace(table, streams=(text, *table.streams[1:]), **steering), temporal=stack, tail=min(full.tail, 1),
                   depth=full.depth and replace(full.depth, dim=D // 2, layers=2, heads=4, ffn=11 * D // 8),
                   dual_ffn=tuple(range(4)) if full.dual_ffn else ())


def build(name: str, width: int) -> MultistreamLM:
    """Random weights: fp32 when small, bf16 as published."""
    torch.manual_seed(0)
    model = MultistreamLM(architecture(name, width))
    with torch.no_grad():
        if name == "higgs":                                  # no code ends the audio: random heads part ways behind an end
            model.audio_head.weight.unflatten(0, (len(model.table.audio_out), -1))[:, model.table.streams[-1].end] = 0
    return model.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32 if width or name == "tiny" else torch.bfloat16)


def frames(model: MultistreamLM, batch: int, count: int) -> Tensor:
    """Random ordinary ids.   -> (B, K, count)"""
    g = torch.Generator().manual_seed(1)
    sizes = [max(2, min(s.classes or s.vocab - 1, 1024 if s.kind == "audio" else 4000) - 2) for s in model.table.streams]
    return torch.stack([torch.randint(0, size, (batch, count), generator=g) for size in sizes], 1)


def training_batch(model: MultistreamLM, batch: int, columns: int = 256) -> tuple[Tensor, Tensor]:
    """Sequential: a quarter text, then audio. Aligned: 65 % text padding at half weight, as moshi-finetune weighs.   -> (B, K, S) twice"""
    table, tokens = model.table, frames(model, batch, columns)
    if not table.aligned:
        quarter = columns // 4 if table.audio else columns
        tokens[:, 0, quarter:], tokens[:, 1:, :quarter] = -1, -1
        return tokens, (tokens >= 0).float()
    padding = torch.rand(batch, columns, generator=torch.Generator().manual_seed(2)) < 0.65
    tokens[:, 0].masked_fill_(padding, min(3, table.streams[0].vocab - 1))
    tokens, weights = delay(tokens, table.delays, table.column("start")), torch.zeros(batch, len(table), columns + 1)
    for k in [*table.text_out, *table.audio_out]:
        weights[:, k, 1 + table.delays[k] :] = 1.0
    weights[:, table.audio_out[0]] *= 100.0
    weights[:, 0] *= torch.where(tokens[:, 0] == 3, 0.5, 1.0)
    return tokens, weights


# ---- sides of both ----

def training_side(net: nn.Module, loss: Side) -> Side:
    """Forward, backward, update. Both sides have the same optimizer."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def side() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return side


def loss_side(vocab: int, streams: int, naive: bool, rows: int = 4096, width: int = 256) -> Side:
    """Forward and backward through a frozen head of `streams` x `vocab`."""
    g = torch.Generator().manual_seed(0)
    h, head = torch.randn(rows, width, generator=g).requires_grad_(), torch.randn(streams * vocab, width, generator=g) / width**0.5
    targets, weights = torch.randint(0, vocab, (rows, streams), generator=g), torch.rand(rows, streams, generator=g)

    def side() -> Tensor:
        h.grad = None
        if naive:
            loss = (F.cross_entropy(F.linear(h, head).view(-1, vocab), targets.flatten(), reduction="none") * weights.flatten()).sum()
        else:
            loss = cross_entropy_sums(h, h[:, :0], lambda h, _: F.linear(h, head).unflatten(-1, (streams, -1)).transpose(0, 1),
                                      targets, weights, streams * vocab, torch.ones(streams)).total      # as train.py calls it
        loss.backward()
        return torch.cat([loss.detach()[None], h.grad.flatten()])

    return side


# ---- transformers, PEFT ----

def transformers_model(folder: Path, model: MultistreamLM) -> nn.Module:
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    audio = bool(model.table.audio)
    kind = transformers.HiggsAudioV2ForConditionalGeneration if audio else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=like(model).dtype, **({"use_text_head": True} if audio else {})).to(like(model).device)


def transformers_training(folder: Path, model: MultistreamLM, tokens: Tensor, weights: Tensor) -> Training:
    """PEFT around transformers, with the loss of its own class. Placeholders stand among the ids, codes (B, n, Q) apart."""
    from peft import PeftModel
    net = PeftModel.from_pretrained(transformers_model(folder, model), folder / "adapter", is_trainable=True).train()
    given: dict[str, Any] = {"input_ids": tokens[:, 0], "labels": tokens[:, 0].masked_fill(weights[:, 0] == 0, -100)}
    if model.table.audio:
        audio = is_audio(tokens, model.table)
        rows = tokens[:, model.table.audio].transpose(1, 2)[audio].view(len(tokens), -1, len(model.table.audio))
        given |= {"input_ids": tokens[:, 0].masked_fill(audio, net.config.audio_token_id), "audio_input_ids": rows, "audio_labels": rows,
                  "audio_input_ids_mask": torch.ones_like(rows[..., 0], dtype=torch.bool)}
    return net, lambda: net(**given, use_cache=False).loss


def transformers_decoding(folder: Path, model: MultistreamLM, prompt: Tensor, columns: int) -> Side:
    net = transformers_model(folder, model).eval()
    ids = {"input_ids": prompt[:, 0], "attention_mask": torch.ones_like(prompt[:, 0])}

    def side() -> Tensor:
        with torch.inference_mode():
            made = net.generate(**ids, max_new_tokens=columns, do_sample=False, eos_token_id=None, pad_token_id=0)
        return undelay(made.transpose(1, 2), model.table.delays[1:]) if model.table.audio else made[:, None, prompt.shape[2] :]

    return side


# ---- moshi, moshi-finetune ----

def moshi_model(folder: Path, model: MultistreamLM, adapter: Path | None = None) -> nn.Module:
    from moshi.models.loaders import get_moshi_lm
    about = read_json((adapter or folder) / "config.json")
    about.pop("model_type")
    lora = adapter and adapter / "lora.safetensors"
    return get_moshi_lm(folder / "model.safetensors", about, like(model).device, like(model).dtype, lora)


def weighted_mean(logits: Tensor, target: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """moshi-finetune's compute_loss_with_mask."""
    weight = (mask.float() * factor).flatten()
    nll = F.cross_entropy(logits.flatten(0, -2).float(), torch.where(mask, target, 0).flatten(), reduction="none")
    return torch.where(weight > 0, nll * weight, 0.0).sum() / weight.sum()


def moshi_training(folder: Path, model: MultistreamLM, tokens: Tensor, weights: Tensor) -> Training:
    """Text padding counts half, the first codebook a hundredfold. Frames that no column holds are never scored."""
    net, table = moshi_model(folder, model, folder / "adapter").train(), model.table
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    frames = undelay(F.pad(tokens, (0, max(table.delays)), value=0), table.delays)
    text, audio = frames[:, :1], frames[:, table.audio_out]
    factors = torch.where(text == 3, 0.5, 1.0), torch.ones(len(table.audio_out), 1, device=tokens.device)
    factors[1][0] = 100.0

    def loss() -> Tensor:
        out = net(frames)
        return weighted_mean(out.text_logits, text, out.text_mask, factors[0]) + weighted_mean(out.logits, audio, out.mask, factors[1])

    return net, loss


def moshi_decoding(folder: Path, model: MultistreamLM, user: Tensor, columns: int) -> Side:
    """user (B, 8, T): what the other speaker says while the model writes."""
    from moshi.models import LMGen
    generator = LMGen(moshi_model(folder, model).eval(), use_sampling=False)

    def side() -> Tensor:
        made = []
        with generator.streaming(1):
            for t in range(columns):
                frame = generator.step(user[..., t : t + 1])
                made += [] if frame is None else [frame]
        return torch.cat(made, -1)

    return side
