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

from options import load_config, read_json, split_arguments

FRAME_RATE = 12.5
Pairs = dict[str, Any]
Table = dict[str, str | Callable[[Any, Pairs], Pairs]]      # a field -> our option, or what it sets given all fields
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LAYERS = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o", "gate_proj": "ffn.gate", "up_proj": "ffn.up",
          "down_proj": "ffn.down", "lm_head": "*_head", "text_lm_head": "text_head", "audio_lm_head": "audio_head",
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
    own = {"data.codec": "mimi_path"} | ({} if f.get("text_llm.enable") else {"init": "moshi_path", "data.tokenizer": "tokenizer_path"})
    return {ours: value for ours, theirs in own.items() if value and not f.get(f"moshi_paths.{theirs}")}     # DSAA's other two are its own


def seconds(value: Any, f: Pairs) -> Pairs:
    return {"data.chunk_seconds": float(value), "data.columns": math.ceil(float(value) * FRAME_RATE) + 1}


def adapters(value: Any, f: Pairs) -> Pairs:
    if flag(value) == flag(f.get("full_finetuning") or False):
        raise ValueError(f"full_finetuning says the {'same' if value else 'opposite'}: one of the two is true")
    if not value:
        return {"lora": "none"}
    rank = int(f.get("lora.rank", 64))
    embeddings = {"lora.train": "embed.*,depth.text,depth.audio"} if f.get("lora.ft_embed") else {}
    return {"lora.rank": rank, "lora.alpha": rank * float(f.get("lora.scaling", 2.0))} | embeddings


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def never(value: Any, f: Pairs) -> Pairs:
    return {}


def rates(name: str, alone: str, fused: str) -> Table:
    """DSAA trains its projectors, or without a text model what moshi-finetune trains, each by a field of its own."""
    return {f"optim.{field}": lambda value, f, on=on: {name: value} if bool(f.get("text_llm.enable")) is on else {}
            for field, on in ((alone, False), (fused, True))}


MOSHI_USUAL: Pairs = {
    "first_codebook_weight_multiplier": 1.0, "text_padding_weight": 0.5, "optim.lr": 1e-4, "optim.weight_decay": 0.1, "optim.proj_lr": 1e-4,
    "optim.proj_wd": 0.05, "optim.pct_start": 0.05, "seed": 0, "num_microbatches": 1, "duration_sec": 10, "batch_size": 1, "max_norm": 1.0,
    "max_steps": 100, "log_freq": 1, "ckpt_freq": 0, "eval_freq": 0, "gradient_checkpointing": True, "lora.enable": False,
    "save_adapters": True, "param_dtype": "bfloat16"}      # what moshi-finetune and DSAA take for a field that is absent or empty


MOSHI: Table = {
    "data.train_data": lambda value, f: {"data.sources": ",".join(value) if isinstance(value, list) else value},
    "run_dir": "out", "duration_sec": seconds, "seed": "seed", "num_microbatches": "accum", "batch_size": "batch_size", "max_norm": "clip",
    "max_steps": lambda value, f: {"steps": steps_of(f)}, "log_freq": "log_every", "eval_batches": "eval_batches",
    "num_ckpt_keep": lambda value, f: {"keep": value or 10**6}, "do_eval": never, "text_llm.enable": never,
    "ckpt_freq": lambda value, f: {"save_every": value if f.get("do_ckpt", True) else 0},
    "eval_freq": lambda value, f: {"eval_every": value if f.get("do_eval") else 0},
    "moshi_paths.hf_repo_id": repository, "moshi_paths.moshi_path": paths("init"), "moshi_paths.mimi_path": paths("data.codec"),
    "moshi_paths.tokenizer_path": paths("data.tokenizer"), "text_padding_weight": "data.text_padding_weight",
    "first_codebook_weight_multiplier": lambda value, f: {"data.stream_weights": ",".join(map(str, f["rows"](float(value))))},
    **rates("lr", "lr", "proj_lr"), **rates("weight_decay", "weight_decay", "proj_wd"),
    "optim.pct_start": lambda value, f: {"schedule": "onecycle", "warmup": round(float(value) * steps_of(f))},
    "param_dtype": lambda value, f: {"dtype": PRECISIONS[value]} if value in PRECISIONS else {},
    "gradient_checkpointing": lambda value, f: {"model.checkpoint": 4 if flag(value) else 0},
    "lora.enable": adapters, "lora.rank": never, "lora.scaling": never, "lora.ft_embed": never, "full_finetuning": never, "do_ckpt": never,
    "save_adapters": lambda value, f: {} if f.get("text_llm.enable") else {
        "consolidated": "moshi-lora" if flag(value) and f.get("lora.enable") else "moshi"},
    "text_llm.hf_repo_id": lambda value, f: {"model.fusion.source": value} if f.get("text_llm.enable") else {},
    "wandb.project": lambda value, f: {"trackers": "wandb"} if value else {}}


def modules(option: str) -> Callable[[Any, Pairs], Pairs]:
    """Official names of modules, all of them or none."""
    def rule(value: Any, f: Pairs) -> Pairs:
        known = [LAYERS.get(name.rpartition(".")[2], "") for name in ([value] if isinstance(value, str) else value or ())]
        return {option: ",".join(known)} if known and all(known) else {}
    return rule


PEFT: Table = {"r": "lora.rank", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "use_rslora": "lora.rslora",
               "use_dora": "lora.dora", "base_model_name_or_path": paths("init"), "target_modules": modules("lora.targets"),
               "modules_to_save": modules("lora.train"), "peft_type": never, "task_type": never, "inference_mode": never}


def precision(value: Any, f: Pairs) -> Pairs:
    return {"dtype": "bf16" if f.get("bf16") else "fp16" if f.get("fp16") else "fp32"}


def hf_steps(value: Any, f: Pairs) -> Pairs:
    epochs = float(f.get("num_train_epochs") or 0)
    if int(f.get("max_steps") or -1) > 0:
        return {"steps": int(f["max_steps"]), "epochs": 0}
    return {"epochs": int(epochs), "steps": 1_000_000} if epochs and epochs.is_integer() else {}


def hf_warmup(value: Any, f: Pairs) -> Pairs:
    given, most = float(f.get("warmup_steps") or 0), int(f.get("max_steps") or -1)
    if given >= 1:
        return {"warmup": int(given)}
    return {"warmup": math.ceil((given or float(f.get("warmup_ratio") or 0)) * most)} if most > 0 else {}       # below 1 it is a share


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
SILENT = {"null", "false", '""', "[]", "{}", '"none"'}         # what says nothing, in every trainer, as JSON


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
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]}); mend it") from None
    else:
        about = read_json(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path} holds no fields; give the YAML or JSON of a trainer")
    for name, mark, table in (("PEFT", "peft_type", PEFT), ("transformers", "per_device_train_batch_size", HF),
                              ("transformers", "learning_rate", HF), ("DSAA", "text_llm", MOSHI),
                              ("moshi-finetune", "moshi_paths", MOSHI), ("moshi-finetune", "duration_sec", MOSHI)):
        if mark in about:
            return name, flat(about), table
    raise ValueError(f"{path} is no config that is known here: moshi-finetune's or DSAA's YAML, PEFT's adapter_config.json, "
                     + "the JSON of transformers' TrainingArguments")


def stream_weights(argv: Sequence[str], factor: float) -> list[float]:
    """The loss weights of the rows of the config that a command line names, with `factor` for the first codebook."""
    words, given = split_arguments(argv, ("help", "smoke", "plan"))
    chosen = (f"--{key}={given[key]}" for key in ("preset", "smoke") if key in given)
    config = load_config([next((word for word in words if word.endswith(".py")), ""), *chosen])
    weights, first = list(config.data.stream_weights) or [1.0] * len(config.model.table), config.model.table.audio_out[0]
    return [*weights[:first], factor, *weights[first + 1 :]]


def with_other_trainer(argv: Sequence[str], say: Callable[[str], Any] | None = None) -> list[str]:
    """A command line in which `--from=FILE` is replaced by the options that the file stands for; the user's own come behind."""
    say = say or (print if os.environ.get("RANK", "0") == "0" else str)          # of several processes the first one prints
    place = next((n for n, word in enumerate(argv) if word == "--from" or word.startswith("--from=")), None)
    if place is None:
        return list(argv)
    joined = "=" in argv[place]
    if not joined and place + 1 == len(argv):
        raise ValueError("--from needs a file: the config of another trainer")
    path = Path(argv[place].partition("=")[2] if joined else argv[place + 1])
    name, given, table = read_other(path)
    usual = MOSHI_USUAL if table is MOSHI else {}
    fields, set_, left = {key: usual.get(key) if value is None else value for key, value in given.items()}, {}, []
    fields |= {k: v for k, v in usual.items() if k not in given} | {"rows": lambda factor: stream_weights(argv, factor)}
    for field, value in fields.items():
        rule = table.get(field, never if field == "rows" else None)
        try:
            found = rule(value, fields) if callable(rule) else {rule: value} if rule is not None and value is not None else {}
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}: {field} is {value!r} ({error}); mend it") from None
        set_ |= found
        shown = json.dumps(value, ensure_ascii=False, default=str)
        if not found and rule is not never and field in given and shown not in SILENT:
            left.append(field if field.endswith(("key", "token")) else f"{field}={shown[:40]}")
    options = [f"--{key}={value}" for key, value in set_.items()]
    say(f"{path} ({name}) sets {' '.join(options) or 'nothing'}")
    if left:
        say(f"without a counterpart, left out: {', '.join(left)}")
    rest = [*argv[:place], *argv[place + 1 + (not joined) :]]
    words = 1 if rest and not rest[0].startswith("-") else 0
    return [*rest[:words], *options, *rest[words:]]
