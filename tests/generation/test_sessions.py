"""Many sessions in one batch: what each gets is what it gets alone, whoever begins, ends or is cut beside it."""

import gc
import random
from dataclasses import replace

import pytest
import torch
from tables import CONFIGS, example, random_ids

from families.family import family_of, lay_out
from generation import sessions
from generation.decode_step import SampleConfig
from generation.dialogue import UserFeed
from generation.sessions import SessionBatch, SlotNoise
from model import MultistreamLM
from sample import generate
from training.monitor import peak_memory

RULES = (SampleConfig(temperature=0.9, max_frames=24), SampleConfig(temperature=0.7, top_k=6, max_frames=24),
         SampleConfig(temperature=1.1, top_p=0.8, min_p=0.02, max_frames=24), SampleConfig(temperature=0, max_frames=24))
USER_FRAMES = 20


def build(name: str) -> MultistreamLM:
    torch.manual_seed(3)
    return MultistreamLM(CONFIGS[name]).eval()


def prompt_of(model: MultistreamLM, number: int) -> tuple[torch.Tensor, object]:
    """A prompt (K, S) that differs from session to session, and a feed for it."""
    family = family_of(model.table)
    if family.user_audio == "duplex":
        return model.table.column("start"), None
    asked = replace(example(model.table, number), codes=None)
    if model.table.layout == "text":
        return lay_out(asked, model.table)[0], None
    return lay_out(asked, model.table)[0], family.feed and family.feed([asked.text], model.table)


def alone(model: MultistreamLM, number: int, user: torch.Tensor | None) -> list[torch.Tensor]:
    prompt, feed = prompt_of(model, number)
    rules, lag = replace(RULES[number % 4], seed=number), max(model.table.delays)
    if user is not None:
        feed, rules = UserFeed(user[None], model.table), replace(rules, max_frames=USER_FRAMES + lag)
    return [said(model, frame[0]) for frame in generate(model, prompt, rules, feed) if bool((frame >= 0).any())]


def said(model: MultistreamLM, frame: torch.Tensor) -> torch.Tensor:
    """A frame without the user's rows: live they come after the agent's, so a session gives them to nobody."""
    return frame[[k for k in range(len(frame)) if k not in model.table.audio or k in model.table.audio_out]]


def together(model: MultistreamLM, count: int, slots: int, users: list, cut: dict[int, int] | None = None) -> list[list[torch.Tensor]]:
    """Sessions that begin two steps apart, in whatever row is free; `cut` ends session n behind so many steps."""
    batch, frames, rows, made = SessionBatch(model, slots, columns=96), [[] for _ in range(count)], {}, [0] * count
    waiting = list(range(count))
    for step in range(400):
        if waiting and step % 2 == 0 and (slot := batch.free()) is not None:
            n = waiting.pop(0)
            prompt, feed = prompt_of(model, n)
            first = batch.begin(slot, prompt, RULES[n % 4], n, feed)
            rows[slot] = n
            frames[n] += [] if first is None else [first]
        for slot, n in list(rows.items()):
            most = USER_FRAMES + max(model.table.delays) if users[n] is not None else 24
            if batch.done(slot) or made[n] == most - 1 or made[n] == (cut or {}).get(n, 1000):
                batch.end(slot)
                del rows[slot]
        if not rows and not waiting:
            return frames
        heard = {}
        for slot, n in rows.items():
            if users[n] is not None:                    # behind its end stands nothing, as in UserFeed
                ended = made[n] >= USER_FRAMES
                heard[slot] = torch.full_like(users[n][:, 0], -1) if ended else users[n][:, made[n]]
            made[n] += 1
        for slot, frame in batch.step(heard).items():
            frames[rows[slot]].append(said(model, frame))
    raise AssertionError("sessions never ended")


def users_of(model: MultistreamLM, count: int) -> list:
    heard = [k for k in model.table.audio if k not in model.table.audio_out]
    duplex = family_of(model.table).user_audio == "duplex"
    return [random_ids(16, (len(heard), USER_FRAMES), 50 + n) if duplex else None for n in range(count)]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a device that captures: the step whose place the device counts, run operation by operation."""
    monkeypatch.setattr(sessions, "why_not", lambda *_: "")
    monkeypatch.setattr(sessions, "capture", lambda step: lambda: step())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_session_gets_what_it_gets_alone(name):
    model = build(name)
    users = users_of(model, 5)
    found, total = together(model, 5, 3, users), 0
    for n, frames in enumerate(found):
        wanted = alone(model, n, users[n])
        assert len(frames) == len(wanted) and torch.equal(torch.stack(frames), torch.stack(wanted)), f"session {n}"
        total += len(wanted)
    assert total >= 15


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ("fast_forward",)])
def test_a_session_gets_what_it_gets_alone_where_the_device_counts(name, counting):
    model = build(name)
    users = users_of(model, 4)
    for n, frames in enumerate(together(model, 4, 2, users)):
        assert torch.equal(torch.stack(frames), torch.stack(alone(model, n, users[n]))), f"session {n}"


def test_survivors_do_not_notice_that_others_are_cut():
    model = build("duplex")
    users = users_of(model, 8)
    cut = together(model, 8, 4, users, cut={1: 3, 2: 0, 4: 7, 6: 1})
    for n in (0, 3, 5, 7):
        assert torch.equal(torch.stack(cut[n]), torch.stack(alone(model, n, users[n])))


def test_guidance_and_repetition_awareness_are_per_row():
    model = build("duplex")
    shared = SampleConfig(cfg=1.7, cfg_no_text=True, ras_window=4, ras_repeats=1, max_frames=20)
    users, batch = users_of(model, 2), SessionBatch(model, 2, shared)
    found: list[list[torch.Tensor]] = [[], []]
    for step in range(18):
        if step in (0, 5):
            batch.begin(step % 2, model.table.column("start"), RULES[step % 2], seed=step)
        live = [0] if step < 5 else [0, 1]
        for slot, frame in batch.step({n: users[n][:, step - 5 * n] for n in live}).items():
            found[slot].append(said(model, frame))
    for n in (0, 1):
        config = replace(shared, temperature=RULES[n].temperature, top_k=RULES[n].top_k, seed=5 * n, max_frames=14)
        wanted = [said(model, f[0]) for f in generate(model, model.table.column("start"), config, UserFeed(users[n][None], model.table))]
        assert torch.equal(torch.stack(found[n])[: len(wanted)], torch.stack(wanted)[: len(found[n])])


def test_the_noise_of_a_row_is_that_of_a_batch_of_one():
    from generation.decode_step import SamplingNoise
    rows, lone = SlotNoise(3, 4, torch.device("cpu")), SamplingNoise(11, 1, 4, torch.device("cpu"))
    rows.put(1, SampleConfig(), 11)
    logits = torch.randn(1, 4, 50)
    for _ in range(5):
        drawn = sessions_draw(rows, logits.expand(3, -1, -1))[1]
        assert torch.equal(drawn, sessions_draw(lone, logits)[0])
        rows.advance()
        lone.advance()


def sessions_draw(noise, logits):
    from generation.decode_step import sample_ids
    return sample_ids(logits.contiguous(), SampleConfig(), slice(0, 4), noise)


def test_a_prompt_that_does_not_fit_is_refused():
    model = build("clone")
    with pytest.raises(ValueError, match="a session holds 8"):
        SessionBatch(model, 1, columns=8).begin(0, prompt_of(model, 1)[0])


def test_memory_stays_flat_over_200_sessions_that_are_cut():
    model, draw = build("duplex"), random.Random(0)
    users, batch = users_of(model, 1)[0], SessionBatch(model, 4)
    survivor, opened, before = [], 0, 0
    batch.begin(0, model.table.column("start"), RULES[0], seed=1)
    while opened < 200:                                 # 3 begin and 3 are cut in two steps
        for slot in range(1, 4):
            if batch.lengths[slot] and draw.random() < 0.9:
                batch.end(slot)
            elif not batch.lengths[slot]:
                batch.begin(slot, model.table.column("start"), RULES[opened % 4], seed=opened)
                opened += 1
        frames = batch.step({n: users[:, batch.lengths[n] % USER_FRAMES] for n in range(4) if batch.lengths[n]})
        survivor += [said(model, frames[0])] if 0 in frames else []
        if opened == 100:
            gc.collect()
            before = sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)), peak_memory()
    gc.collect()
    assert sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)) <= before[0] * 1.05
    assert peak_memory() <= before[1] + 0.02
    user = users[:, [n % USER_FRAMES for n in range(1, len(survivor) + 4)]]
    config = replace(RULES[0], seed=1, max_frames=len(survivor) + 1)
    wanted = [said(model, f[0]) for f in generate(model, model.table.column("start"), config, UserFeed(user[None], model.table))]
    assert torch.equal(torch.stack(survivor)[:60], torch.stack(wanted)[:60])


def test_a_session_that_hears_the_wrong_number_of_codebooks_is_told_so():
    model = build("duplex")
    batch = SessionBatch(model, 1)
    batch.begin(0, model.table.column("start"))
    with pytest.raises(ValueError, match="3 codebooks, the model hears 2"):
        batch.step({0: torch.zeros(3, dtype=torch.long)})


