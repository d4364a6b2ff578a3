"""`train.py --from=FILE`: what a config of another trainer sets here, and what is named because nothing stands for it."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, call

from config import TrainConfig
from families.other_trainers import with_other_trainer
from options import load_config

MOSHI = """
data:
  train_data: 'talks/a.jsonl,talks/b.jsonl:2'
  eval_data: 'talks/held.jsonl'
  shuffle: true
moshi_paths:
  hf_repo_id: "kyutai/moshika-pytorch-bf16"
  mimi_path: "mine/mimi.safetensors"
full_finetuning: false
lora:
  enable: true
  rank: 64
  scaling: 2.
  ft_embed: false
first_codebook_weight_multiplier: 100.
text_padding_weight: .5
duration_sec: 100
batch_size: 16
max_steps: 2000
gradient_checkpointing: true
optim:
  lr: 2e-6
  weight_decay: 0.1
  pct_start: 0.05
seed: 7
log_freq: 1
eval_freq: 100
do_eval: false
ckpt_freq: 50
save_adapters: true
run_dir: "runs/x"
mystery: 3
"""


def made(path: Path, config: str, *more: str) -> tuple[TrainConfig, list[str]]:
    said: list[str] = []
    argv = with_other_trainer([f"configs/{config}.py", f"--from={path}", *more], said.append)
    return load_config([str(ROOT / argv[0]), *argv[1:]], kind="TrainConfig"), said


def test_a_yaml_of_moshi_finetune(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "moshi_7B.yaml"
    path.write_text(MOSHI)
    c, said = made(path, "moshi_lora", "--seed=9")
    assert c.data.sources == ("talks/a.jsonl", "talks/b.jsonl:2") and c.out == "runs/x" and c.seed == 9      # the user's own word
    assert (c.init, c.data.tokenizer, c.data.codec) == (*["kyutai/moshika-pytorch-bf16"] * 2, "mine/mimi.safetensors")
    assert (c.data.chunk_seconds, c.data.columns) == (100.0, 1251) and c.data.stream_weights == (1.0, 100.0, *[1.0] * 7, *[0.0] * 8)
    assert (c.lora.rank, c.lora.alpha, c.lora.train) == (64, 128.0, ()) and c.consolidated == "moshi-lora"
    assert (c.lr, c.weight_decay, c.schedule, c.warmup, c.steps) == (2e-6, 0.1, "onecycle", 100, 2000)
    assert (c.batch_size, c.save_every, c.eval_every, c.log_every) == (16, 50, 0, 1) and c.model.checkpoint == 4
    assert "--lora.rank=64" in said[0] and "moshi-finetune" in said[0]
    assert said[1] == 'without a counterpart, left out: data.eval_data="talks/held.jsonl", data.shuffle=true, mystery=3'


def test_a_yaml_of_dsaa_counts_its_list_of_steps(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "qwen.yaml"
    path.write_text("text_llm:\n  enable: true\n  hf_repo_id: Qwen/Qwen2.5-3B-Instruct\nfull_finetuning: true\nduration_sec: 180\n"
                    + "max_steps: [400, 800]\noptim:\n  proj_lr: 2e-4\n  finetune_lr: 1e-5\n  pct_start: .05\nonly_text: true\n")
    c, said = made(path, "dsaa")
    assert (c.steps, c.warmup, c.lr, c.data.columns) == (1200, 60, 2e-4, 2251) and c.model.fusion.source == "Qwen/Qwen2.5-3B-Instruct"
    assert said[1].endswith("left out: optim.finetune_lr=\"1e-5\", only_text=true")


def test_fields_that_are_absent_or_empty_are_the_trainers_own_defaults(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "x.yaml"
    path.write_text("duration_sec: 20\nfull_finetuning: true\nlora:\noptim:\nnum_ckpt_keep: null\nwandb:\n  key: s3cret\nmystery: 0\n")
    c, said = made(path, "moshi_lora")
    assert c.lora is None and (c.lr, c.batch_size, c.steps, c.warmup) == (1e-4, 1, 100, 5) and c.keep > 1000
    assert c.data.stream_weights == (1.0, 1.0, *[1.0] * 7, *[0.0] * 8) and c.consolidated == "moshi" and c.save_every == 0
    assert said[1] == "without a counterpart, left out: wandb.key, mystery=0"
    path.write_text("duration_sec: 20\nlora:\n  enable: true\nfirst_codebook_weight_multiplier: 50\n")
    c, said = made(path, "hibiki")
    assert len(c.data.stream_weights) == len(c.model.table) and c.data.stream_weights[c.model.table.audio_out[0]] == 50.0
    for words, rows in ((("--preset", "both"), [1.0, 50.0]), (("--smoke",), [1.0, 50.0])):
        argv = with_other_trainer(["configs/moshi_full.py", f"--from={path}", *words], said.append)
        given = next(word for word in argv if word.startswith("--data.stream_weights="))
        assert [float(x) for x in given.partition("=")[2].split(",")][:2] == rows
    rc, _, err = call("train.py", f"--from={path}")
    assert rc == 2 and "config file" in err and err.count("\n") == 1, err
    path.write_text("text_llm:\n  enable: false\n  hf_repo_id: x/y\nlora:\n  enable: true\noptim:\n  lr: 2e-6\n  proj_lr: 1e-4\n")
    c, said = made(path, "moshi_lora")
    assert c.lr == 2e-6 and "(DSAA)" in said[0] and "optim.proj_lr" in said[1] and 'text_llm.hf_repo_id="x/y"' in said[1]
    for text, words in (("duration_sec: long\n", "duration_sec is 'long'"), ("duration_sec: 2\nmax_steps: [a]\n", r"max_steps is \['a'\]"),
                        ("duration_sec: 2\nfull_finetuning: false\n", "full_finetuning says the opposite"),
                        ("duration_sec: 2\nfull_finetuning: true\nlora:\n  enable: true\n", "full_finetuning says the same"),
                        ("duration_sec: 2\nfull_finetuning: true\ngradient_checkpointing: 'false'\n", "expected true or false")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.yaml: .*{words}"):
            made(path, "moshi_lora")


def test_an_adapter_config_of_peft(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "r": 32, "lora_alpha": 64,
        "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "modules_to_save": None, "bias": "none",
        "rank_pattern": {}, "layers_to_transform": [1, 2]}))
    c, said = made(path, "ivr_qwen")
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout, c.lora.rslora) == (32, 64.0, 0.1, True)
    assert set(c.lora.targets) == {"attn.q", "ffn.down"} and c.init == "Qwen/Qwen2.5-1.5B-Instruct"
    assert said[1] == "without a counterpart, left out: layers_to_transform=[1, 2]"


def test_training_arguments_of_transformers(tmp_path):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({
        "output_dir": "out/hf", "learning_rate": 1e-4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "max_steps": 300,
        "num_train_epochs": 3.0, "warmup_ratio": 0.1, "warmup_steps": 0, "lr_scheduler_type": "cosine", "adam_beta1": 0.9,
        "adam_beta2": 0.98, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "bf16": True, "fp16": False, "save_strategy": "steps",
        "save_steps": 50, "eval_strategy": "steps", "eval_steps": 25, "logging_steps": 5, "save_total_limit": 2, "report_to": ["wandb"],
        "group_by_length": True, "neftune_noise_alpha": None}))
    c, said = made(path, "ivr_qwen")
    assert (c.out, c.lr, c.batch_size, c.accum, c.steps, c.epochs, c.warmup) == ("out/hf", 1e-4, 4, 8, 300, 0, 30)
    assert (c.schedule, c.betas, c.eps, c.clip, c.dtype) == ("cosine", (0.9, 0.98), 1e-6, 0.5, "bf16")
    assert (c.save_every, c.eval_every, c.log_every, c.keep, c.trackers) == (50, 25, 5, 2, ("wandb",))
    assert said[1] == "without a counterpart, left out: group_by_length=true"
    path.write_text(json.dumps({"learning_rate": 1e-4, "num_train_epochs": 3}))
    assert made(path, "ivr_qwen")[0].epochs == 3
    path.write_text(json.dumps({"learning_rate": 1e-4, "num_train_epochs": 2.5, "max_steps": 20, "warmup_steps": 0.1}))
    c, said = made(path, "ivr_qwen")
    assert (c.steps, c.warmup) == (20, 2)
    path.write_text(json.dumps({"learning_rate": 1e-4, "num_train_epochs": 2.5}))
    assert "num_train_epochs=2.5" in made(path, "ivr_qwen")[1][1]


def test_what_is_no_config_of_a_trainer_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    for text, words in (('{"a": 1}', "no config that is known here"), ("[]", "holds no fields")):
        path.write_text(text)
        rc, _, err = call("train.py", "configs/tiny.py", f"--from={path}")
        assert rc == 2 and words in err and err.count("\n") == 1, err
    assert with_other_trainer(["configs/tiny.py", "--lr=1"]) == ["configs/tiny.py", "--lr=1"]
