"""The grid: delays, layouts, weights."""

import random

import pytest
import torch
from tables import aligned_table, clone_table, example, sequential_example
from torch.utils._python_dispatch import TorchDispatchMode

from corpus.examples import show
from families.family import lay_out
from families.tiny import MAX_AGE, WordFeed, word_rows
from generation.turns import Undelay
from streams import Example, Stream, StreamTable, audio_block, delay, is_audio, join, text_block, undelay

CASES = range(25)


def random_case(seed: int) -> tuple[list[int], torch.Tensor]:
    draw = random.Random(seed)
    K, T = draw.randint(1, 9), draw.randint(1, 30)
    return [draw.randint(0, 7) for _ in range(K)], torch.randint(0, 1000, (K, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", CASES)
def test_undelay_inverts_delay(seed: int) -> None:
    delays, frames = random_case(seed)
    assert torch.equal(undelay(delay(frames, delays, -7, tail=-9), delays), frames)


@pytest.mark.parametrize("seed", CASES)
def test_cut_delay_loses_only_the_frames_that_never_complete(seed: int) -> None:
    delays, frames = random_case(seed)
    whole = max(0, frames.shape[1] - max(delays))
    columns = delay(frames, delays, -7)
    assert columns.shape[1] == frames.shape[1] + 1
    assert torch.equal(undelay(columns, delays), frames[:, :whole])


@pytest.mark.parametrize("seed", CASES)
def test_streaming_undelay_equals_undelay(seed: int) -> None:
    delays, frames = random_case(seed)
    columns, undelayer = delay(frames, delays, -7, tail=-9), Undelay(delays)
    out = [undelayer.push(columns[None, :, s])[0] for s in range(columns.shape[1])]
    assert torch.equal(torch.stack(out[1 + max(delays):], dim=1), frames)


@pytest.mark.parametrize("seed", CASES)
def test_delay_keeps_a_batch_axis(seed: int) -> None:
    delays, frames = random_case(seed)
    batch = torch.stack([frames, frames + 1])
    assert torch.equal(delay(batch, delays, 5, tail=6)[1], delay(frames + 1, delays, 5, tail=6))


def test_delay_by_hand() -> None:
    frames = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert delay(frames, [0, 2], 8, tail=9).tolist() == [[8, 1, 2, 3, 9, 9], [8, 8, 8, 4, 5, 6]]
    assert delay(frames, [0, 2], 8).tolist() == [[8, 1, 2, 3], [8, 8, 8, 4]]


def test_higgs_segment_of_the_specification() -> None:
    # K=4, T=2: row 0 is BOS 0 1 EOS EOS EOS EOS, row 3 BOS BOS BOS BOS 6 7 EOS; L = T + K + 1 columns
    tokens, weights = audio_block(torch.arange(8).view(4, 2), 1.0, clone_table(4))
    assert tokens[1].tolist() == [16, 0, 1, 17, 17, 17, 17] and tokens[4].tolist() == [16, 16, 16, 16, 6, 7, 17]
    assert weights[1].tolist() == [0, 1, 1, 1, 0, 0, 0] and weights[4].tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("seed", CASES)
def test_every_codebook_of_a_segment_has_its_codes_and_one_end_as_targets(seed: int) -> None:
    draw = random.Random(seed)
    Q, T = draw.randint(1, 8), draw.randint(1, 20)
    tokens, weights = audio_block(torch.randint(0, 16, (Q, T)), 1.0, clone_table(Q))
    for k in range(1, Q + 1):
        targets = tokens[k][weights[k] > 0]
        assert len(targets) == T + 1 and targets[-1] == 17 and (targets[:-1] < 16).all()


@pytest.mark.parametrize("seed", CASES)
def test_planned_audio_columns_equal_delayed_codes(seed: int) -> None:
    """Twice, with what came back overwritten in between: nobody is handed what others share."""
    delays, codes = random_case(seed)
    rows = tuple(Stream(f"cb{k}", "audio", 1010, 1010, d, 1000 + k, 1009) for k, d in enumerate(delays))
    table = StreamTable((Stream("text", "text", 9, 9), *rows), "clone", audio_start=7)
    for _ in range(2):
        tokens, weights = audio_block(codes, 0.3, table)
        framed, edges = torch.cat([codes, table.column("end", table.audio)], 1), table.column("start", table.audio)
        assert torch.equal(tokens[1:], delay(framed, delays, edges, tail=framed[:, -1:])) and (tokens[0] == -1).all()
        assert torch.equal(weights[1:], delay(torch.full(framed.shape, 0.3), delays, 0.0, tail=0.0)) and not weights[0].any()
        tokens.fill_(-5)
        weights.fill_(-5)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do: the price of a small grid."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_grid_takes_few_operations() -> None:
    for table, ex, limit in ((aligned_table(8), example(aligned_table(8), 1), 40),
                             (clone_table(8), sequential_example(clone_table(8), 1), 60)):
        lay_out(ex, table)
        with Operations() as operations:
            lay_out(ex, table)
        assert 0 < operations.count <= limit, (table.layout, operations.count)


def test_segment_without_a_start_id_has_no_start_column() -> None:
    table = StreamTable((Stream("text", "text", 9, 9), Stream("cb1", "audio", 18, 18, 0, -1, 17)), "clone", audio_start=7)
    tokens, weights = audio_block(torch.tensor([[3, 4]]), 1.0, table)
    assert tokens.tolist() == [[-1, -1, -1], [3, 4, 17]] and weights[1].tolist() == [1, 1, 1]


def test_clone_grid_trains_the_last_speech_only() -> None:
    table = clone_table(3)
    tokens, weights = lay_out(sequential_example(table, 0), table)
    starts = (tokens[0] == 30).nonzero().flatten()
    assert len(starts) == 2 and weights[:, : starts[1] + 1].sum() == 0
    assert tokens[0][weights[0] > 0].tolist() == [31]                   # the id that ends speech is a text target


def test_prompt_is_the_head_of_the_training_grid() -> None:
    for table, ex in ((clone_table(3), sequential_example(clone_table(3), 1)), (aligned_table(3), example(aligned_table(3), 1))):
        grid, _ = lay_out(ex, table)
        prompt, weights = lay_out(Example(ex.text, None, ex.starts, ex.reference), table)
        assert torch.equal(prompt, grid[:, : prompt.shape[1]]) and weights.sum() == 0


@pytest.mark.parametrize("seed", CASES)
def test_layouts_never_train_padding_or_the_first_column(seed: int) -> None:
    for table, ex in ((clone_table(4), sequential_example(clone_table(4), seed)), (aligned_table(4), example(aligned_table(4), seed))):
        tokens, weights = lay_out(ex, table)
        assert weights[:, 0].sum() == 0 and weights[tokens < 0].sum() == 0
        read_only = [k for k, s in enumerate(table.streams) if not s.classes]
        assert weights[read_only].sum() == 0


def test_audio_columns_are_those_with_a_code() -> None:
    table = clone_table(2)
    tokens = torch.tensor([[5, -1, -1, 6], [-1, 3, -1, -1], [-1, -1, 4, -1]])
    assert is_audio(tokens, table).tolist() == [False, True, True, False]


def test_word_rows_hold_word_next_previous_and_age() -> None:
    rows = word_rows(torch.tensor([5, 6, 7]), torch.tensor([-1, 0, 1, 2]), torch.tensor([0, 0, 3, 99]))
    assert rows.tolist() == [[0, 5, 6, 7], [5, 6, 7, 0], [0, 0, 5, 6], [0, 0, 3, MAX_AGE]]


@pytest.mark.parametrize("seed", CASES)
def test_word_feed_writes_the_rows_that_training_wrote(seed: int) -> None:
    table = aligned_table(3)
    ex = example(table, seed)
    grid, _ = lay_out(ex, table)
    feed = WordFeed([ex.text], table)
    for s in range(1, grid.shape[1]):
        column = torch.full((1, len(table)), -1)
        column[:, 4] = grid[4, s]
        assert torch.equal(feed(column)[0, :5], grid[:5, s]), s
    assert feed.may_end().tolist() == [True]


def test_advance_is_trained_exactly_where_the_sampler_decides() -> None:
    table = aligned_table(2)
    ex = Example(torch.tensor([1, 2, 3]), torch.zeros(2, 9, dtype=torch.long), torch.tensor([0, 3, 5]))
    tokens, weights = lay_out(ex, table)
    assert weights[4].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]      # frames 1..5: after the first word, up to the last
    assert tokens[4, 1:].nonzero().flatten().tolist() == [0, 3, 5]


def test_text_leads_audio_by_the_delay_of_the_first_codebook() -> None:
    table = aligned_table(2)
    ex = Example(torch.tensor([4, 5]), torch.arange(8).view(2, 4), torch.tensor([0, 2]))
    tokens, _ = lay_out(ex, table)
    assert tokens[0, 1 + 2] == 5 and tokens[5, 1 + 2 + 2] == 2             # word of frame 2; code of frame 2 two columns later


def test_join_refuses_to_train_what_nothing_predicts() -> None:
    tokens, weights = join([text_block(torch.tensor([1, 2]), 1.0, clone_table(1))])
    assert weights[0].tolist() == [0, 1] and tokens[1].tolist() == [-1, -1]


def test_table_knows_its_rows() -> None:
    table = aligned_table(3)
    assert table.text == [0, 1, 2, 3, 4] and table.audio == [5, 6, 7] and table.text_out == [4] and table.audio_out == [5, 6, 7]
    assert table.delays == [0, 0, 0, 0, 0, 2, 3, 4]


def test_table_rejects_two_predicted_text_rows() -> None:
    with pytest.raises(AssertionError, match="at most one text row"):
        StreamTable((Stream("a", "text", 3, 3), Stream("b", "text", 3, 3)), "text")


def test_show_marks_targets() -> None:
    table = clone_table(1)
    drawn = show(torch.tensor([[5, 6], [-1, 2]]), torch.tensor([[0.0, 1.0], [0.0, 0.5]]), table)
    assert drawn.splitlines()[0].split() == ["text", "5", "6*"] and drawn.splitlines()[1].split() == ["cb1", "-1", "2*"]
