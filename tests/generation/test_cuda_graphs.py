"""Generation by graphs: a tape that records a column's operations stands for the CUDA graph, and must make the same frames."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from tables import CONFIGS, END, example, random_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.peers import build
from families.family import family_of, lay_out
from families.tiny import WordFeed
from generation.cuda_graphs import GraphRunner, why_not
from generation.decode_step import ColumnKind, DecodeStep, SampleConfig
from generation.dialogue import UserFeed
from generation.turns import FREE
from layers.int8_base import quantize
from lora import LoraConfig, inject, merge
from model import MultistreamLM
from options import run_config
from sample import generate, pad_left
from streams import Example


class Tape(TorchDispatchMode):
    """The operations of one run. Played again they read and write the same memory, as the kernels of a CUDA graph do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def __call__(self) -> None:
        for func, args, kwargs, out in self.operations:
            old, new = tensors(func(*args, **kwargs)), tensors(out)
            given = {t.untyped_storage().data_ptr() for t in tensors([args, list(kwargs.values())])}
            for fresh, place in zip(old, new, strict=True):
                if place.untyped_storage().data_ptr() not in given:        # not a view of what went in
                    place.copy_(fresh)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors(part)]
    return [value] if isinstance(value, Tensor) else []


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """Let the CPU pass for a device that captures; -> what was recorded."""
    made: list[Tape] = []

    def record(step: Callable[[], None]) -> Tape:
        runner = step.__closure__[1].cell_contents
        stalled = runner.stalled.clone()
        runner.stalled.fill_(True)                 # recording runs the step, capturing does not: leave nothing behind
        with Tape() as tape:
            step()
        runner.stalled.copy_(stalled)
        made.append(tape)
        return tape

    monkeypatch.setattr("generation.cuda_graphs.capture", record)
    monkeypatch.setattr("generation.cuda_graphs.why_not", lambda model, device, feed: why_not(model, torch.device("cuda"), feed))
    yield made


def make(name: str) -> MultistreamLM:
    torch.manual_seed(5)
    model = MultistreamLM(CONFIGS[name]).eval()
    if model.table.audio_out and not model.config.depth and model.table.streams[-1].end >= 0:
        with torch.no_grad():                      # ends come often, in any codebook
            model.audio_head.weight.view(3, 18, -1)[:, END] *= 3
    return model


def prompts(model: MultistreamLM, count: int) -> list[Tensor]:
    examples = [example(model.table, seed) for seed in range(count)]
    return [lay_out(Example(ex.text, None, ex.starts, ex.reference), model.table)[0] for ex in examples]


def both(model: MultistreamLM, grid: Tensor, config: SampleConfig, feed: Callable[[], object] = lambda: None, **given) -> Tensor:
    """Frames by graphs, after they were compared with those without."""
    plain = list(generate(model, grid, replace(config, graphs="off"), feed(), **given))
    again = list(generate(model, grid, replace(config, graphs="on"), feed(), **given))
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    return torch.stack(again, -1)


RULES = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0}, "early": {"temperature": 1.2, "top_k": 9, "min_frames": 6},
         "ras": {"temperature": 0.5, "ras_window": 4, "ras_repeats": 1, "closing": "hf"},
         "limit": {"temperature": 1.0, "closing": "boson", "max_speech": 7}}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["clone", "dual", "dual_list", "tails", "depth"])
def test_graphs_make_the_frames_that_are_made_without(name: str, rules: dict, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    decided, decide, kinds = [], GraphRunner.decide, set()
    monkeypatch.setattr(GraphRunner, "decide", lambda self, *rest: decided.append(1) or decide(self, *rest))
    model = make(name)
    for count, seed in ((1, 0), (1, 1), (3, 0), (3, 1)):
        both(model, pad_left(prompts(model, count)), SampleConfig(max_frames=40, seed=seed, **rules))
        kinds |= model.replay.graphs.keys()
    assert tapes                                     # something was recorded, and played
    assert rules["temperature"] == 0 or len(decided) >= 3 and len(kinds) >= 2, (len(decided), kinds)       # something ended


@pytest.mark.parametrize("name", ["qwen", "mha", "llama3", "window", "depth_schedule", "text"])
def test_every_kind_of_stack_is_captured(name: str, tapes: list[Tape]) -> None:
    model = make(name)
    both(model, pad_left(prompts(model, 2)), SampleConfig(temperature=0.9, top_p=0.8, repetition_penalty=1.3, max_frames=24))
    assert tapes


def test_a_ring_goes_round(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = make("duplex"), MultistreamLM.cache
    monkeypatch.setattr(MultistreamLM, "cache", lambda self, batch, columns: cache(self, batch, columns, chunk=8))
    capacity = model.cache(1, 2000).capacity
    rules = SampleConfig(temperature=1.0, max_frames=capacity + 30)
    start = model.table.column("start")[None].expand(2, -1, -1)
    frames = both(model, start, rules, lambda: UserFeed(random_ids(16, (2, 2, capacity + 29), 3), model.table))
    assert frames.shape[-1] > capacity and len(tapes) == 1


def test_what_is_given_and_guided(tapes: list[Tape]) -> None:
    model = make("duplex")
    start = model.table.column("start")[None]
    given = torch.full((1, len(model.table), 5), FREE)
    given[:, 0] = random_ids(40, (1, 5), 1)
    given[:, 2, 3] = 7
    frames = both(model, start, SampleConfig(temperature=1.0, max_frames=14), given=given)
    assert frames[0, 0, :5].tolist() == given[0, 0].tolist() or frames[0, 0, 1:5].tolist() == given[0, 0, 1:].tolist()
    both(model, start, SampleConfig(temperature=1.0, max_frames=14, cfg=2.0, cfg_no_text=True, cfg_hide=3))
    assert tapes


def test_graphs_serve_the_next_prompt_of_their_size_class(tapes: list[Tape]) -> None:
    model = make("dual")
    grids = prompts(model, 5)
    for n, grid in enumerate([pad_left(grids[:3]), pad_left(grids[1:5]), pad_left(grids[2:5])]):
        both(model, grid, SampleConfig(temperature=1.0, repetition_penalty=1.5, max_frames=20 + n, seed=n))
    runner = model.replay
    assert len(tapes) == sum(tape is not None for tape in runner.graphs.values()) and len(runner.known) == 4     # filled up to four
    both(model, grids[0], SampleConfig(temperature=1.0, max_frames=9))
    assert model.replay is not runner                                                # another size class
    runner = model.replay
    with torch.no_grad():
        model.temporal.layers[0].attn.o.weight = torch.nn.Parameter(model.temporal.layers[0].attn.o.weight * 2)
    both(model, grids[0], SampleConfig(temperature=1.0, max_frames=9))
    assert model.replay is not runner                                                # weights lie elsewhere
    stream = generate(model, grids[0], SampleConfig(temperature=1.0, max_frames=9, graphs="on"))
    next(stream)
    both(model, grids[1], SampleConfig(temperature=1.0, max_frames=9))               # while another one has the buffers
    stream.close()
    both(model, grids[2], SampleConfig(temperature=1.0, max_frames=9))
    assert copy.deepcopy(model).replay is None and model.replay is not None
    assert not hasattr(model.double(), "replay")                                     # a model that moves leaves them behind


def test_words_are_fed_on_the_device_and_users_are_told_ahead(tapes: list[Tape]) -> None:
    model = make("words")
    words = [example(model.table, seed).text for seed in (3, 5, 6)]
    start = torch.stack([lay_out(Example(ids), model.table)[0] for ids in words])
    both(model, start, SampleConfig(temperature=1.0, max_frames=60), lambda: WordFeed(words, model.table))
    moshi = build("moshi", 32).eval()
    user = random_ids(1000, (2, 8, 20), 1)
    start = moshi.table.column("start")[None].expand(2, -1, -1)
    rules = SampleConfig(temperature=(0.7, *[0.8] * 8), top_k=(25.0, *[250.0] * 8), max_frames=21)
    both(moshi, start, rules, lambda: UserFeed(user, moshi.table))
    assert len(tapes) == 2
    both(moshi, start, rules, lambda: UserFeed(user.flip(-1), moshi.table, True))                   # who talks next finds the graph there
    assert len(tapes) == 2


def test_text_that_a_prompt_has_left_is_fed_on_the_device(tapes: list[Tape]) -> None:
    """A prefix depth transformer with heads of two sizes, a penalty of its own codes, text that is only read."""
    torch.manual_seed(5)
    model = MultistreamLM(run_config(ROOT / "configs/qwen_tts.py", "smoke").model).eval()
    start = torch.full((2, 9, 4), -1)
    start[:, 0], start[:, 1], start[1, :, 0] = 70, torch.tensor([263, 264, 265, 270]), -1
    rules = SampleConfig(temperature=0.9, top_k=50, repetition_penalty=1.3, max_frames=20)
    texts = [torch.tensor([65, 66, 67]), torch.tensor([68])]
    both(model, start, rules, lambda: family_of(model.table).feed(texts, model.table))
    both(model, start, rules)
    assert tapes


@pytest.mark.parametrize("name", ["dual", "duplex", "tails", "depth", "qwen"])
def test_weights_of_8_bits_go_the_fast_way(name: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(make(name).requires_grad_(False))
    start = model.table.column("start")[None] if name == "duplex" else pad_left(prompts(model, 2))
    rules = SampleConfig(temperature=0.0, max_frames=20)
    frames = both(model, start, rules)
    assert model.cache(1, 4).fast is not None and tapes
    monkeypatch.setattr("kernels.attention.KVCache.takes_fast_path", lambda self, S: False)     # block by block, as the model is defined
    slow = torch.stack(list(generate(model, start, replace(rules, graphs="off"))), -1)
    assert torch.equal(slow, frames)


def test_why_there_is_no_graph() -> None:
    model = make("dual")
    start, rules = prompts(model, 1)[0], SampleConfig(max_frames=3, graphs="on")
    with pytest.raises(ValueError, match="graphs=on: the model is not on a CUDA device; use graphs=auto"):
        next(generate(model, start, rules))
    cuda = torch.device("cuda")
    assert why_not(model, cuda, None) == "" and "input feed" in why_not(model, cuda, lambda column: column)
    inject(model, LoraConfig(rank=2, targets=("attn.*",)))
    assert "merge the adapters" in why_not(model, cuda, None)
    assert why_not(merge(model), cuda, None) == "" and "not support" in why_not(make("fast_forward"), cuda, None)
    with pytest.raises(AssertionError, match="none of auto, on, off"):
        SampleConfig(graphs="yes")


class Watch(TorchDispatchMode):
    """No operation may read or make a tensor of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert all(t.device.type == "meta" for t in tensors([args, list((kwargs or {}).values()), out])), func
        return out


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("name", ["dual", "tails", "duplex", "words", "depth", "text"])
def test_a_column_looks_at_no_value_and_needs_nothing_of_the_host(name: str, cfg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is no value to look at: `.item()`, `nonzero` and the like raise."""
    model = make(name).to("meta")
    table, prompt = model.table, torch.zeros(2, len(model.table), 5, dtype=torch.long, device="meta")
    feed = WordFeed([torch.tensor([3, 4])] * 2, table) if name == "words" else None
    config = SampleConfig(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, ras_window=3, min_frames=3, closing="hf", cfg=cfg, cfg_hide=2,
                          repetition_penalty=1.2)
    states = torch.zeros(4 if cfg != 1 else 2, 1, model.config.temporal.dim, device="meta")
    monkeypatch.setattr("generation.decode_step.prefill", lambda *_, **__: (states, states))
    monkeypatch.setattr("generation.decode_step.recent_codes", lambda prompt, table, n: prompt.new_zeros(2, len(table.audio_out), n))
    with torch.inference_mode():
        runner = GraphRunner(DecodeStep(model, prompt, config, 64, feed)).begin(2)
        kinds = [ColumnKind(bool(table.text_out), bool(table.audio_out), True)]
        if not table.aligned:
            kinds = [ColumnKind(True, False, False)] + [ColumnKind(False, True, True), ColumnKind(True, True, None)] * bool(table.audio_out)
        for kind in kinds:
            runner.step(kind)                        # constants are sent once
            with Watch():
                runner.step(kind)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dual", "tails", "depth", "qwen"])
def test_captured_graphs_on_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = make(name).cuda()
    for count in (1, 3):
        for temperature in (0.0, 1.0):
            both(model, pad_left(prompts(model, count)), SampleConfig(temperature=temperature, max_frames=40))
    moshi = build("moshi", 32).eval().cuda()
    user = random_ids(1000, (2, 8, 20), 1)
    start = moshi.table.column("start")[None].expand(2, -1, -1)
    both(moshi, start, SampleConfig(temperature=0.0, max_frames=21), lambda: UserFeed(user, moshi.table))
