"""Configs of other trainers: `train.py configs/moshi_lora.py --from=moshi_7B.yaml`.

    moshi-finetune, DSAA     YAML
    PEFT                     adapter_config.json
    transformers             the JSON of TrainingArguments

A field that has a counterpart here becomes an option, which is printed; options of the command line win. The names of all others
are printed, so that nothing is lost unseen. PyYAML is imported when a YAML file is read.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from options import read_json

FRAME_RATE = 12.5
Pairs = dict[str, Any]
Table = dict[str, str | Callable[[Any, Pairs], Pairs]]      # a field -> our option, or what it sets given all fields
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LAYERS = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o", "gate_proj": "ffn.gate", "up_proj": "ffn.up",
          "down_proj": "ffn.down", "lm_head": "text_head", "text_lm_head": "text_head", "audio_lm_head": "audio_head",
          "embed_tokens": "embed.text", "audio_embed": "embed.audio", "all-linear": "temporal.*"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
             "warmup_stable_decay": "wsd"}


def steps_of(f: Pairs) -> int:
    found = f.get("max_steps", 100)
    return sum(map(int, found)) if isinstance(found, list) else int(found)


def paths(name: str) -> Callable[[Any, Pairs], Pairs]:
    """A path of moshi_paths; without one of their own codec and tokenizer come from the repository."""
    return lambda value, f: {name: value} if value else {}


def repository(value: Any, f: Pairs) -> Pairs:
    given = {"init": "moshi_paths.moshi_path", "data.codec": "moshi_paths.mimi_path", "data.tokenizer": "moshi_paths.tokenizer_path"}
    return {ours: value for ours, theirs in given.items() if value and not f.get(theirs)}


def seconds(value: Any, f: Pairs) -> Pairs:
    return {"data.chunk_seconds": float(value), "data.columns": math.ceil(float(value) * FRAME_RATE) + 1}


def adapters(value: Any, f: Pairs) -> Pairs:
    if not value:
        return {"lora": "none"} if f.get("full_finetuning") else {}
    rank = int(f.get("lora.rank", 64))
    embeddings = {"lora.train": "embed.*,depth.text,depth.audio"} if f.get("lora.ft_embed") else {}
    return {"lora.rank": rank, "lora.alpha": rank * float(f.get("lora.scaling", 2.0))} | embeddings


def never(value: Any, f: Pairs) -> Pairs:
    return {}


MOSHI: Table = {
    "data.train_data": lambda value, f: {"data.sources": ",".join(value) if isinstance(value, list) else value},
    "run_dir": "out", "duration_sec": seconds, "seed": "seed", "num_microbatches": "accum", "batch_size": "batch_size", "max_norm": "clip",
    "max_steps": lambda value, f: {"steps": steps_of(f)}, "log_freq": "log_every", "num_ckpt_keep": "keep", "eval_batches": "eval_batches",
    "ckpt_freq": lambda value, f: {"save_every": value if f.get("do_ckpt", True) else 0},
    "eval_freq": lambda value, f: {"eval_every": value if f.get("do_eval") else 0},
    "moshi_paths.hf_repo_id": repository, "moshi_paths.moshi_path": paths("init"), "moshi_paths.mimi_path": paths("data.codec"),
    "moshi_paths.tokenizer_path": paths("data.tokenizer"), "text_padding_weight": "data.text_padding_weight",
    "first_codebook_weight_multiplier": lambda value, f: {"data.stream_weights": f"1.0,{float(value)}" + 7 * ",1.0" + 8 * ",0.0"},
    "optim.lr": "lr", "optim.proj_lr": "lr", "optim.weight_decay": "weight_decay", "optim.proj_wd": "weight_decay",
    "optim.pct_start": lambda value, f: {"schedule": "onecycle", "warmup": round(float(value) * steps_of(f))},
    "param_dtype": lambda value, f: {"dtype": PRECISIONS[value]} if value in PRECISIONS else {},
    "gradient_checkpointing": lambda value, f: {"model.checkpoint": 4 if value else 0},
    "lora.enable": adapters, "lora.rank": never, "lora.scaling": never, "lora.ft_embed": never, "full_finetuning": never, "do_ckpt": never,
    "do_eval": never, "save_adapters": lambda value, f: {"consolidated": "moshi-lora" if value and f.get("lora.enable") else "moshi"},
    "text_llm.enable": never, "text_llm.hf_repo_id": "model.fusion.source",
    "wandb.project": lambda value, f: {"trackers": "wandb"} if value else {}}


def targets(value: Any, f: Pairs) -> Pairs:
    known = [LAYERS[name] for name in ([value] if isinstance(value, str) else value) if name in LAYERS]
    return {"lora.targets": ",".join(known)} if known and len(known) == len([value] if isinstance(value, str) else value) else {}


def saved_modules(value: Any, f: Pairs) -> Pairs:
    known = [LAYERS[name.rpartition(".")[2]] for name in value or () if name.rpartition(".")[2] in LAYERS]
    return {"lora.train": ",".join(known)} if known and len(known) == len(value) else {}


PEFT: Table = {"r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "use_rslora": "lora.rslora",
               "use_dora": "lora.dora", "base_model_name_or_path": paths("init"), "target_modules": targets,
               "modules_to_save": saved_modules, "peft_type": never, "task_type": never, "inference_mode": never}


def precision(value: Any, f: Pairs) -> Pairs:
    return {"dtype": "bf16" if f.get("bf16") else "fp16" if f.get("fp16") else "fp32"}


def hf_steps(value: Any, f: Pairs) -> Pairs:
    epochs = float(f.get("num_train_epochs") or 0)
    if int(f.get("max_steps") or -1) > 0:
        return {"steps": int(f["max_steps"]), "epochs": 0}
    return {"epochs": math.ceil(epochs), "steps": 1_000_000} if epochs else {}


def hf_warmup(value: Any, f: Pairs) -> Pairs:
    if int(f.get("warmup_steps") or 0):
        return {"warmup": int(f["warmup_steps"])}
    most = int(f.get("max_steps") or -1)
    return {"warmup": math.ceil(float(f.get("warmup_ratio") or 0) * most)} if most > 0 else {}


HF: Table = {
    "output_dir": "out", "learning_rate": "lr", "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accum",
    "weight_decay": "weight_decay", "adam_epsilon": "eps", "max_grad_norm": "clip", "seed": "seed", "data_seed": "data.seed",
    "adam_beta1": lambda value, f: {"betas": f"{value},{f.get('adam_beta2', 0.999)}"},
    "adam_beta2": lambda value, f: {"betas": f"{f.get('adam_beta1', 0.9)},{value}"}, "max_steps": hf_steps, "num_train_epochs": hf_steps,
    "warmup_steps": hf_warmup, "warmup_ratio": lambda value, f: hf_warmup(value, f), "bf16": precision, "fp16": precision,
    "lr_scheduler_type": lambda value, f: {"schedule": SCHEDULES[value]} if value in SCHEDULES else {},
    "save_steps": lambda value, f: {"save_every": int(value)} if f.get("save_strategy", "steps") == "steps" and value >= 1 else {},
    "eval_steps": lambda value, f: {"eval_every": int(value)} if value and f.get("eval_strategy") == "steps" and value >= 1 else {},
    "logging_steps": lambda value, f: {"log_every": int(value)} if value >= 1 else {}, "save_total_limit": "keep",
    "gradient_checkpointing": lambda value, f: {"model.checkpoint": 4 if value else 0}, "torch_compile": "compile",
    "save_strategy": never, "eval_strategy": never,
    "report_to": lambda value, f: {"trackers": ",".join(x for x in ([value] if isinstance(value, str) else value)
                                                       if x in ("wandb", "tensorboard", "trackio"))}}
SILENT = (None, False, "", [], {}, "none")         # what says nothing, in every trainer


def flat(value: Any, prefix: str = "") -> Pairs:
    """Nested fields under dotted names."""
    found: Pairs = {}
    for key, part in value.items():
        found |= flat(part, f"{prefix}{key}.") if isinstance(part, dict) and part else {f"{prefix}{key}": part}
    return found


def read_other(path: Path) -> tuple[str, Pairs, Table]:
    """Whose config a file is, its fields, and their counterparts."""
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise ValueError(f"{path} is YAML, which needs a package: pip install pyyaml, or save it as .json") from None
        try:
            about = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]}); mend it") from None
    else:
        about = read_json(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no fields; give the YAML or JSON of a trainer")
    for name, mark, table in (("PEFT", "peft_type", PEFT), ("transformers", "per_device_train_batch_size", HF),
                              ("transformers", "learning_rate", HF), ("moshi-finetune", "moshi_paths", MOSHI),
                              ("moshi-finetune", "duration_sec", MOSHI), ("DSAA", "text_llm", MOSHI)):
        if mark in about:
            return name, flat(about), table
    raise ValueError(f"{path} is no config that is known here: moshi-finetune's or DSAA's YAML, PEFT's adapter_config.json, "
                     + "the JSON of transformers' TrainingArguments")


def print_once(line: str) -> None:
    """Of several processes the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def with_other_trainer(argv: Sequence[str], say: Callable[[str], Any] = print_once) -> list[str]:
    """A command line in which `--from=FILE` is replaced by the options that the file stands for; the user's own come behind."""
    place = next((n for n, word in enumerate(argv) if word == "--from" or word.startswith("--from=")), None)
    if place is None:
        return list(argv)
    joined = "=" in argv[place]
    if not joined and place + 1 == len(argv):
        raise ValueError("--from needs a file: the config of another trainer")
    path = Path(argv[place].partition("=")[2] if joined else argv[place + 1])
    name, fields, table = read_other(path)
    set_, left = {}, []
    for field, value in fields.items():
        rule = table.get(field)
        found = rule(value, fields) if callable(rule) else {rule: value} if rule is not None and value is not None else {}
        set_ |= found
        if not found and rule is not never and value not in SILENT:
            left.append(f"{field}={json.dumps(value, ensure_ascii=False, default=str)[:40]}")
    options = [f"--{key}={value}" for key, value in set_.items()]
    say(f"{path} ({name}) sets {' '.join(options) or 'nothing'}")
    if left:
        say(f"without a counterpart, left out: {', '.join(left)}")
    rest = [*argv[:place], *argv[place + 1 + (not joined) :]]
    words = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:words], *options, *rest[words:]]
