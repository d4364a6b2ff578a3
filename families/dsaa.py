"""DSAA: a frozen text language model next to a frozen Moshi, fused after the last layer of both.

Rows, layout and rules are Moshi's; the modules that join the two are layers/fusion.py. Here: the config of a new model,
its warm start from plain Moshi and any text model (`checkpoint.py setup-dsaa`), and the layout of the reference,
slavivo/dsaa. The warm start, special ids of its own and norms for each part are ours.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from families import moshi as base
from families.family import Family
from families.formats import About, Conversion, Format, Tensors, official_files
from families.moshi import read_moshi, tidy_moshi, write_moshi
from families.qwen import QWEN2_5_1_5B
from layers.architecture import FusionConfig, ModelConfig
from layers.fusion import fingerprint
from model import MultistreamLM
from options import apply, from_json, to_json
from text.tokenizers import load_tokenizer


def special_ids(tower: ModelConfig, tokenizer: Any, padding: str) -> tuple[int, int, int]:
    """Ids that begin a text row, fill a frame without a word, and announce a word.

    padding "own": the last two rows of the text model's vocabulary, which its tokenizer must leave free. "space": both
    the id of a space, as the reference has it.
    """
    table = tower.table
    V = table.streams[0].vocab
    try:
        start = tokenizer.encode("<|im_start|>") if tokenizer else []
    except ValueError:                                 # a word list knows no such word
        start = []
    first = start[0] if len(start) == 1 else table.stop[0] if table.stop else 0
    if padding == "space":
        if tokenizer is None:
            raise ValueError("padding 'space' needs the text model's tokenizer.json beside its weights")
        return first, tokenizer.encode(" ")[0], tokenizer.encode(" ")[0]
    if padding != "own":
        raise ValueError(f"padding {padding!r} is neither 'own' nor 'space'")
    if tokenizer is not None and tokenizer.size > V - 2:
        raise ValueError(f"the text model has {V} ids and its tokenizer uses {tokenizer.size}: none is free; use --padding=space")
    return first, V - 2, V - 1


def design(moshi: ModelConfig, fusion: FusionConfig, start: int, pad: int, epad: int) -> ModelConfig:
    """The config of a new model: Moshi's rows with the text model's vocabulary, both towers looking back equally far."""
    if moshi.depth is None or moshi.fusion is not None or not moshi.table.aligned:
        raise ValueError("--moshi is no plain Moshi; give a checkpoint with a depth transformer and text, agent and user rows")
    tower = fusion.tower
    V = tower.table.streams[0].vocab
    if fusion.rate == "frame":
        tower = replace(tower, temporal=replace(tower.temporal, window=moshi.temporal.window))
    first = replace(moshi.table.streams[0], vocab=V, classes=V, start=start)
    table = replace(moshi.table, streams=(first, *moshi.table.streams[1:]), pad=pad, epad=epad)
    return replace(moshi, table=table, fusion=replace(fusion, tower=tower))


@torch.no_grad()
def warm_start(model: nn.Module, moshi: dict[str, Tensor]) -> None:
    """Fill a new model from plain Moshi weights (our names) and its own tower, so that it begins where both were.

    The depth transformer's input is Moshi's at first: skip = [0 | input_k | 1] and nothing from the network behind it.
    Text logits are the text model's: the projector's `down` is zero. Word pieces reach the depth transformer through
    the main directions of the text model's embedding.
    """
    own = dict(model.named_parameters())
    for name, tensor in moshi.items():
        if name in own and not name.startswith(("embed.text", "text_head", "depth.text", "depth.input", "tower.")):
            own[name].copy_(tensor)
    body, depth = model.tower.body, model.depth
    model.text_head.weight.copy_(body.text_head.weight)
    depth.text.weight.copy_(body.embed["text"].weight)
    for p in model.text_projector.down.parameters():
        p.zero_()
    weight, bias = principal_map(body.embed["text"].weight, depth.text_map.weight.shape[0])
    depth.text_map.weight.copy_(weight)
    depth.text_map.bias.copy_(bias)
    if depth.input.kind != "residual":
        return                                        # only a projector with a skip can pass Moshi's input on
    for p in depth.input.down.parameters():
        p.zero_()
    skip, inputs = depth.input.skip.weight, moshi["depth.input.weight"]                # (steps, Dd, Dt + Da + Dd), (steps, Dd, Da)
    Dd, Da = inputs.shape[1:]
    skip.zero_()
    skip[..., -Dd - Da : -Dd] = inputs
    skip[..., -Dd:] = torch.eye(Dd)


def principal_map(table: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, Dt) and bias of the map onto the main directions of an embedding (V, Dt), mean removed.

    Directions that the table does not have are zero: its width may lie below `outputs`.
    """
    table = table.double()
    mean = table.mean(0)
    _, vectors = torch.linalg.eigh((table - mean).mT @ (table - mean))                 # eigenvalues rise
    found = vectors.flip(1)[:, :outputs].mT
    found = found * found.gather(1, found.abs().argmax(1, keepdim=True)).sign()        # a sign of its own for every machine
    weight = torch.zeros(outputs, table.shape[1], dtype=torch.double)
    weight[: len(found)] = found
    return weight.float(), -(weight @ mean).float()


PROJECTED = (("norm", "norm"), ("up", "fc1"), ("down", "fc2"), ("skip", "skip"))
OTHERS = ("embed.text.weight", "depth.text.weight", "depth.input.weight", "text_head.weight")       # not named as in Moshi
NAMES = (*(rule for rule in base.NAMES if rule[0] not in OTHERS),
        ("text_head.weight", "text_head.weight"), ("text_projector.scale", "text_projector.alpha"),
        *((f"text_projector.{ours}.{{p}}", f"text_projector.fusion.{n}.{{p}}") for ours, n in (("norm", 0), ("up", 1), ("down", 4))),
        ("depth.text.weight", "depformer_text_emb.emb.weight"), ("depth.text_map.{p}", "depformer_text_proj.{p}"),
        *((f"depth.input.{ours}.{{p}}", f"depformer_projectors.{{k}}.{theirs}.{{p}}") for ours, theirs in PROJECTED))


def tidy_dsaa(tensors: Tensors, config: ModelConfig) -> Tensors:
    """As Moshi; norms and biases of the projectors get the axis that theirs are stacked along."""
    return {n: t[None] if t.dim() == 1 and n.startswith("depformer_projectors.") else t for n, t in tidy_moshi(tensors, config).items()}


def split_dsaa(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Undo `tidy_dsaa`; the reference keeps attention one tensor a step."""
    return {n: t[0] if len(t.shape) == 2 and n.startswith("depformer_projectors.") and (n.endswith("bias") or ".norm." in n) else t
            for n, t in base.unflat(tensors).items()}


def read_dsaa(about: About, tensors: Tensors) -> ModelConfig:
    """As Moshi, with the text model's vocabulary; text_llm says which model that is, and how it is fused."""
    llm, steps = about["text_llm"], about["dep_q"]
    tower, V = from_json(ModelConfig, llm["model"], "text_llm.model"), tensors["text_head.weight"].shape[0]
    base_config = read_moshi(about, tensors, ("text_llm", "existing_bos_id"))
    start, pad = about.get("existing_bos_id"), about["existing_text_padding_id"]
    first = replace(base_config.table.streams[0], vocab=V, classes=V, start=V if start is None else start)
    fusion = FusionConfig(tower, str(llm.get("hf_repo_id") or ""), str(llm.get("revision") or ""),
                          hidden=tensors["text_projector.fusion.1.weight"].shape[0],
                          **{k: llm[k] for k in ("rate", "dropout", "split_norm") if k in llm})
    if fusion.tower.table.streams[0].vocab != V or steps != len(base_config.table.audio_out):
        raise ValueError(f"text_llm has {fusion.tower.table.streams[0].vocab} ids, text_head {V}; name the text model it was made with")
    epad = about.get("existing_text_end_padding_id", pad)
    table = replace(base_config.table, streams=(first, *base_config.table.streams[1:]), pad=pad, epad=epad)
    return replace(base_config, table=table, fusion=fusion)


def write_dsaa(c: ModelConfig, dtype: str) -> About:
    fusion, text = c.fusion, c.table.streams[0]
    llm = {"hf_repo_id": fusion.source, "revision": fusion.revision, "model": to_json(fusion.tower), "rate": fusion.rate,
           "dropout": fusion.dropout, "split_norm": fusion.split_norm}
    about = write_moshi(replace(c, fusion=None), dtype)
    about.pop("text_card_out", None)                   # the reference takes it from the text model, and does not know the key
    return about | {
        "text_card": text.classes, "existing_bos_id": text.start, "existing_text_padding_id": c.table.pad,
        "existing_text_end_padding_id": c.table.epad, "moshi_name": "dsaa.safetensors", "text_llm": llm}


def with_text_model(about: About, tensors: Tensors, source: str, opened: Any) -> About:
    """The config.json of a reference model names its text model only: add that model's architecture, and its ids.

    Runs of the reference train with ids of the text model's tokenizer and write those of the Moshi that they began with.
    """
    llm = about["text_llm"]
    if "model" in llm:
        return about
    tower = opened(llm.get("hf_repo_id", ""))
    about = about | {"text_llm": llm | {"model": to_json(tower.config)}}
    if "existing_bos_id" in about:
        return about
    file = official_files(Path(tower.extras.folder)).get("tokenizer")
    ids = special_ids(tower.config, load_tokenizer(file) if file else None, "space")
    return about | dict(zip(("existing_bos_id", "existing_text_padding_id", "existing_text_end_padding_id"), ids, strict=True))


def setup_dsaa(moshi: Any, text_llm: Any, padding: str = "own", **choices: Any) -> tuple[ModelConfig, Tensors, Any]:
    """New weights from plain Moshi and any text model, both loaded, begun where both were; `choices` are fields of FusionConfig."""
    source = text_llm.extras.source
    if text_llm.config.table.audio or text_llm.config.fusion:
        raise ValueError(f"{source} is no plain text model: it has audio rows; give a Qwen checkpoint")
    typed = apply(FusionConfig(QWEN2_5_1_5B), {key: str(value) for key, value in choices.items()})
    files = official_files(Path(text_llm.extras.folder)) | dict(text_llm.extras.data or {})
    tokenizer = load_tokenizer(files["tokenizer"]) if "tokenizer" in files else None
    ids = special_ids(text_llm.config, tokenizer, padding)
    name = str(Path(source).resolve()) if Path(source).exists() else source
    fusion = FusionConfig(text_llm.config, name, fingerprint(text_llm.weights()), **{key: getattr(typed, key) for key in choices})
    model = MultistreamLM(design(moshi.config, fusion, *ids))
    model.tower.body = text_llm
    warm_start(model, moshi.weights())
    data = {**(moshi.extras.data or official_files(Path(moshi.extras.folder))), **({"tokenizer": files["tokenizer"]} if tokenizer else {})}
    return model.config, model.weights(), data if "tokenizer" in data else None


# the other fields of FusionConfig follow from the text model
CHOICES = tuple(f.name for f in fields(FusionConfig) if f.name not in ("tower", "source", "revision"))
FORMAT = Format("dsaa", "dsaa", lambda c: (*base.DEMUX, *NAMES) if c.demux else NAMES, read_dsaa, write_dsaa,
                lambda c: c.fusion is not None,
                lambda about: about.keys() >= base.KEYS and isinstance(about.get("text_llm"), dict), tidy_dsaa, split_dsaa,
                weight_file=base.weight_name, named=base.named_weights, adapter=base.named_adapter, complete=with_text_model)
FAMILIES = (Family(
    "DSAA", "", "a frozen Qwen beside a frozen Moshi, fused late; laid out as Moshi", formats=(FORMAT,),
    conversions=(Conversion("setup-dsaa", """setup-dsaa --moshi=M --text-llm=L --out=DIR    new weights from two checkpoints or hub ids:
    --padding=own|space, --rate=frame|token and the other fields of FusionConfig (layers/architecture.py)""",
                            setup_dsaa, ("moshi", "text_llm"), ("padding", *CHOICES)),)),)
