"""--plan: what it promises is what a step takes, at three sizes; and the words around it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call
from tables import CONFIGS, grid

from checkpoint import save
from generation.plan import Tally, config_of, parse_size
from model import MultistreamLM
from options import run_config
from training.plan import changes, need_of_training, recipes, table

STEP = """
import json, sys, torch
from contextlib import nullcontext
from pathlib import Path
import lora
from checkpoint import Extras, load, write_checkpoint
from config import TrainConfig
from corpus.data_config import DataConfig
from families.tensor_files import computed
from generation.plan import typical_batch
from layers.architecture import ModelConfig, StackConfig
from model import MultistreamLM
from streams import Stream, StreamTable, codebooks
from training.plan import held_types, need_of_training

def now(field):
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0]) * 1024

case, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
audio = codebooks(8, 1026, 1026, 1024, 1025, range(8))
table = StreamTable((Stream("text", "text", case["words"], case["words"]), *audio), "clone", audio_start=1, audio_end=2, stop=(2,))
stack = StackConfig(dim=case["dim"], layers=case["layers"], heads=8, kv_heads=4, ffn=4 * case["dim"])
model = ModelConfig(table, stack, checkpoint=case["checkpoint"], dual_ffn=tuple(range(0, case["layers"], 2)))
adapters = lora.LoraConfig(rank=8, targets=("attn.*",)) if case["lora"] else None
config = TrainConfig(model, DataConfig(columns=case["columns"]), lora=adapters, batch_size=2)
with torch.device("meta"):
    weights = MultistreamLM(model).weights()
write_checkpoint(folder, "model", model, {n: computed(t, lambda t=t: torch.randn(t.shape) * 0.02) for n, t in weights.items()}, Extras())
load(folder).hidden(torch.zeros(1, 9, 4, dtype=torch.long))             # libraries wake up
x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()
Path("/proc/self/clear_refs").write_text("5")
before = now("VmRSS")
net = load(folder, prepare=lambda m: held_types(m, config.lora, config.rates, config.quantize)).train()
net = lora.inject(net, adapters) if adapters else net
trained = [p for p in net.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, fused=True)
tokens, counted = typical_batch(table, 2, case["columns"])
places = torch.arange(case["columns"]).expand(2, -1)
for n in (16, case["columns"]):                                         # the first step makes the moments, the second has the peak
    net(tokens[..., :n], counted[..., :n], places[:, :n], torch.zeros_like(places)[:, :n], scale=torch.ones(9) / 1000).total.backward()
    optimizer.step()
    optimizer.zero_grad()
measured = now("VmHWM") - before
print(json.dumps([need_of_training(config, torch.float32, "cpu").total, measured]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="Linux says how much memory a process had")
@pytest.mark.parametrize("case", [
    {"dim": 512, "layers": 6, "words": 8000, "columns": 512, "checkpoint": 0, "lora": False},
    {"dim": 768, "layers": 6, "words": 16000, "columns": 1024, "checkpoint": 0, "lora": True},
    {"dim": 896, "layers": 6, "words": 8000, "columns": 640, "checkpoint": 4, "lora": False}], ids=["full", "lora", "recomputed"])
def test_the_peak_of_a_step_is_the_one_that_was_planned(case: dict, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STEP, json.dumps(case), str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"})      # else glibc keeps blocks that were freed
    assert done.returncode == 0, done.stderr
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured > 400 << 20 and abs(planned / measured - 1) < 0.15, (planned / 2**20, measured / 2**20, planned / measured)


def test_a_tally_counts_what_lives() -> None:
    with Tally() as tally:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]
        c = a + 1
        assert tally.now == 8000 and bool(c.any())
        del c
        assert tally.now == 4000 and tally.most >= 8000
        del a
        assert tally.now == 4000 and len(b) == 8                # a view keeps its tensor


def test_what_a_rate_of_zero_freezes_is_planned_as_frozen() -> None:
    config = run_config(ROOT / "configs/moshi_full.py", "smoke")
    whole = need_of_training(config, torch.bfloat16, "cpu")
    part = need_of_training(replace(config, rates=(("temporal", 0.0), ("embed", 0.0))), torch.bfloat16, "cpu")
    model = MultistreamLM(config.model)
    frozen = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("temporal.", "embed.")))
    assert part.trained == whole.trained - frozen > 0
    assert (part.gradients, part.optimizer, part.weights) == (4 * part.trained, 8 * part.trained, whole.weights - 2 * frozen)


def test_sizes_are_read_and_others_refused() -> None:
    assert parse_size("24GB") == 24 * 10**9 and parse_size("16GiB") == 2**34 and parse_size("8") == 8 * 10**9 and parse_size("") == 0
    with pytest.raises(ValueError, match="--plan=big is no size"):
        parse_size("big")


def test_train_says_what_it_needs_and_what_makes_it_fit() -> None:
    rc, out, err = call("train.py", "configs/tiny.py", "--plan")
    assert rc == 0 and "parameters" in out and "AdamW" in out and "activations" in out, err
    rc, out, err = call("train.py", "configs/ivr_qwen.py", "--plan=3GB", "--ranks=2")
    assert rc == 0 and all(words in out for words in ("does not fit 3GB", "fits with", "--quantize=int8", "on each of 2 ranks")), out + err
    rc, out, err = call("train.py", "configs/tiny.py", "--plan=huge")
    assert rc == 2 and "is no size" in err


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows are counted again here, all of them by `train.py --plan=table`; the configs say what theirs says."""
    monkeypatch.chdir(ROOT)
    head, line, *counted = table([ROOT / f"configs/{name}.py" for name in ("ivr_qwen", "kyutai_stt")])
    rows = (ROOT / "README.md").read_text().partition(f"{head}\n{line}\n")[2].partition("\n\n")[0].splitlines()
    names, known = [row.split(",")[0] for row in rows], [f"| {path.stem}" for path in recipes()]
    assert {*counted} <= {*rows} and names == known, ("write the output of train.py --plan=table into README.md", counted, names, known)
    for path, row in zip(recipes(), rows, strict=True):
        assert f"Needs {row.split(' | ')[2]} GiB" in path.read_text().partition('"""\n')[0], path
    rc, _, err = call("train.py", "configs/tiny.py", "--plan=table")
    assert rc == 2 and "takes no other word" in err


def test_sample_says_what_it_needs(tmp_path: Path) -> None:
    save(MultistreamLM(CONFIGS["clone"]), tmp_path)
    rc, out, err = call("sample.py", "--ckpt", tmp_path, "--plan=1GB")
    assert rc == 0 and "cache each" in out and "fits 1GB" in out, out + err
    assert config_of(str(tmp_path)) == CONFIGS["clone"] and grid(CONFIGS["clone"])[0].shape[1] == 4


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "dsaa_ae"))
def test_every_recipe_can_be_planned_and_what_would_make_it_smallest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    smoke = run_config(ROOT / f"configs/{name}.py", "smoke")
    needs = [need_of_training(config, torch.float32, "cpu") for config in (smoke, *(changed for _, changed in changes(smoke)[-1:]))]
    assert all(need.total > need.weights > 0 for need in needs) and needs[-1].total <= needs[0].total
