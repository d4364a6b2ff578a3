"""What official code says of a folder: each function takes a folder, a prompt and what we said behind it, and returns what theirs says and
the part of ours that it stands beside; None where its package is not installed. Read by test_official_folders.py."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint import load
from streams import undelay

Pair = tuple[Tensor, Tensor] | None


def loaded(kind: str, folder: Path, adapter: Path | None = None, **options: object) -> Any:
    """A model of transformers in fp32, an adapter put on it by PEFT; None without the packages."""
    try:
        import transformers
        from peft import PeftModel
    except ImportError:
        return None
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **options)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def qwen(folder: Path, prompt: Tensor, said: Tensor, adapter: Path | None = None, **rules: float) -> Pair:
    """The Auto class of transformers, with the rules of its own generation_config.json."""
    if (model := loaded("AutoModelForCausalLM", folder, adapter)) is None:
        return None
    ids = prompt[:1]
    found = model.generate(input_ids=ids, do_sample=False, max_new_tokens=said.shape[1], attention_mask=torch.ones_like(ids), **rules)
    found = found[:, ids.shape[1] :]
    return found, said[:, : found.shape[1]]


def orpheus(folder: Path, prompt: Tensor, said: Tensor, adapter: Path | None = None) -> Pair:
    """Ids of one vocabulary: of a model that speaks in turns of codebooks only, ours are frames, so they are drawn here by hand."""
    if (found := qwen(folder, prompt, prompt.new_zeros(1, 20), adapter, repetition_penalty=1.0)) is None:
        return None
    model, ids = load(folder, adapter=adapter), prompt[None]
    for _ in range(20):
        ids = torch.cat([ids, model(torch.nn.functional.pad(ids, (0, 1), value=-1))[0][:, -1:].argmax(-1)[None]], -1)
    return found[0], ids[0, :, prompt.shape[1] :]


def higgs(folder: Path, prompt: Tensor, said: Tensor, adapter: Path | None = None) -> Pair:
    """Delayed columns of the class of transformers; those that end the speech stand otherwise there (test_parity.py)."""
    if (model := loaded("HiggsAudioV2ForConditionalGeneration", folder, adapter, use_text_head=True)) is None:
        return None
    ids = prompt[:1, (prompt[1:] < 0).all(0)]
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=said.shape[1] + 9,
                           ras_win_len=None)
    columns, ours = found[0].mT, said[1:, (said[1:] >= 0).all(0)]
    ends = (columns == model.config.audio_stream_eos_id).any(0).nonzero()
    theirs = undelay(columns, range(len(columns)))[:, : min(ours.shape[1], int(ends[0]) - len(columns) if len(ends) else columns.shape[1])]
    return theirs, ours[:, : theirs.shape[1]]


def csm(folder: Path, prompt: Tensor, said: Tensor, adapter: Path | None = None) -> Pair:
    if (model := loaded("CsmForConditionalGeneration", folder, adapter)) is None:
        return None
    found = model.generate(input_ids=prompt[:1], max_new_tokens=said.shape[1], do_sample=False, depth_decoder_do_sample=False)
    return found[0].mT[:, : said.shape[1]], said[1:, : found.shape[1]]


def kyutai(folder: Path, heard: Tensor, said: Tensor, adapter: Path | None = None) -> Pair:
    """The loader and the generator of moshi as its run_inference.py has them: the first frame twice; an adapter as its server takes it."""
    try:
        from moshi.models import LMGen
        from moshi.models.loaders import CheckpointInfo
        from moshi.run_inference import get_condition_tensors
    except ImportError:
        return None
    about = json.loads((folder / "config.json").read_text())
    files = (folder / about.get(f"{what}_name", "model.safetensors") for what in ("moshi", "mimi", "tokenizer"))
    config, own = (adapter or folder) / "config.json", None if adapter is None else str(adapter / "lora.safetensors")
    info = CheckpointInfo.from_hf_repo("none", *map(str, files), config_path=config, lora_weights=own)
    model = info.get_moshi("cpu", torch.float32)
    assert info.get_text_tokenizer().vocab_size() == about["text_card"]
    told = get_condition_tensors(info.model_type, model, 1, 1.0)
    generator = LMGen(model, condition_tensors=told, **info.lm_gen_config | {"use_sampling": False})
    frames = []
    with generator.streaming(1):
        for t in (0, *range(heard.shape[2])):
            frame = generator.step(heard[:, :, t : t + 1])
            frames += [] if frame is None else [frame[0, :, 0]]
    found = torch.stack(frames, -1)                        # of one that answers without delay, also what the script leaves out
    return found[:, : said.shape[1]], said[:, : found.shape[1]]


def moss(folder: Path, prompt: Tensor, said: Tensor) -> Pair:
    """Its modeling file is in no package: two Qwen3 that share their first layers, and the state machine of its generation, row by row."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        return None
    from make import moss_logits
    about, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    shared, pad, sosp, eosp = (about[name] for name in ("num_shared_layers", "modality_pad_token_id", "sosp_token_id", "eosp_token_id"))
    sides = []
    for side, words, embedding in (("text", "vocab_size", "embed_tokens"), ("audio", "audio_vocab_size", "audio_embed")):
        own = {"model.embed_tokens.weight": tensors[f"model.{embedding}.weight"], "lm_head.weight": tensors[f"{side}_lm_head.weight"],
               "model.norm.weight": tensors[f"model.{side}_norm.weight"]}
        for name, t in tensors.items():
            if found := re.fullmatch(rf"model\.(shared|{side})_block\.layers\.(\d+)\.(.+)", name):
                own[f"model.layers.{int(found[2]) + shared * (found[1] == side)}.{found[3]}"] = t
        shape = {k: v for k, v in about.items() if "token_id" not in k and k not in ("auto_map", "architectures", "model_type")}
        model = Qwen3ForCausalLM(Qwen3Config(**shape | {"vocab_size": about[words], "attn_implementation": "eager"})).eval()
        model.load_state_dict({name: t.float() for name, t in own.items()}, assign=True)
        sides.append(model)
    rows, speaking = torch.stack([prompt[0].where(prompt[0] >= 0, pad), prompt[1].clamp(min=0)]), False
    while rows.shape[1] < prompt.shape[1] + said.shape[1]:
        speaking = bool(rows[1, -1] != eosp) if speaking else bool(rows[0, -1] == sosp)
        word, code = (logits[0, -1].argmax() for logits in moss_logits(*sides, rows, pad))
        rows = torch.cat([rows, torch.stack([torch.tensor(pad) if speaking else word, code])[:, None]], 1)
    new = rows[:, prompt.shape[1] :]
    speech = new[0] == pad
    return torch.stack([new[0].masked_fill(speech, -1), new[1].masked_fill(~speech | (new[1] == eosp), -1)]), said
