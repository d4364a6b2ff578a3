"""Generation by graphs: a tape that records a column's operations stands for the CUDA graph, and must make the same frames."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tables import CONFIGS, END, aligned_table, example
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import replay
from drawing import Writer
from duplex import UserFeed
from lora import LoraConfig, inject, merge, quantize
from model import ModelConfig, MultistreamLM, StackConfig
from peers import build
from sample import SampleConfig, generate, pad_left
from streams import Example, WordFeed, lay_out

LOOKS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "lift_fresh", "equal", "masked_select", "unique")


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

    why = replay.why_not
    monkeypatch.setattr(replay, "capture", record)
    monkeypatch.setattr(replay, "why_not", lambda model, device, feed: why(model, torch.device("cuda"), feed))
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


@pytest.mark.parametrize("rules", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.2, "top_k": 9, "min_frames": 6},
                                   {"temperature": 0.5, "ras_window": 4, "ras_repeats": 1, "closing": "hf"},
                                   {"temperature": 1.0, "closing": "boson", "max_speech": 7}],
                         ids=["greedy", "drawn", "early", "ras", "limit"])
@pytest.mark.parametrize("name", ["clone", "dual", "dual_list", "tails", "depth"])
@pytest.mark.parametrize("count", [1, 3])
def test_graphs_make_the_frames_that_are_made_without(name: str, rules: dict, count: int, tapes: list[Tape]) -> None:
    model = make(name)
    for seed in range(3):
        both(model, pad_left(prompts(model, count)), SampleConfig(max_frames=40, seed=seed, **rules))
    assert tapes                                   # something was recorded, and played


def test_graphs_serve_the_next_prompt_of_their_size_class(tapes: list[Tape]) -> None:
    model = make("dual")
    grids = prompts(model, 5)
    for n, grid in enumerate([pad_left(grids[:3]), pad_left(grids[1:5]), pad_left(grids[2:5])]):
        both(model, grid, SampleConfig(temperature=1.0, max_frames=20 + n, seed=n))
    kinds = {id(t) for t in model.replay.graphs.values()}
    assert len(tapes) == len(kinds) and len(model.replay.known) == 4                # one runner, filled up to four items
    runner = model.replay
    with torch.no_grad():
        model.text_head.weight = torch.nn.Parameter(model.text_head.weight.clone())
    both(model, grids[0], SampleConfig(temperature=1.0, max_frames=9))
    assert model.replay is not runner


def test_words_and_users_are_fed_on_the_device(tapes: list[Tape]) -> None:
    model = make("words")
    ex = example(model.table, 3)
    both(model, lay_out(Example(ex.text), model.table)[0], SampleConfig(temperature=1.0, max_frames=30), lambda: WordFeed([ex.text], model.table))
    moshi = build("moshi", 32).eval()
    user = torch.randint(0, 1000, (2, 8, 20), generator=torch.Generator().manual_seed(1))
    start = moshi.table.column("start")[None].expand(2, -1, -1)
    rules = SampleConfig(temperature=(0.7, *[0.8] * 8), top_k=(25.0, *[250.0] * 8), max_frames=21)
    both(moshi, start, rules, lambda: UserFeed(user, moshi.table))
    assert len(tapes) == 2
