"""The embedded text-to-speech family: words aligned with frames, small enough to train on two CPU cores in minutes.

    word       four four four ...  nine nine       the word that is spoken, held for its whole length
    next       nine nine nine ...   two  two       rows that are only read: next and previous word, age in frames
    advance       1    0    0 ...     1    0       a word begins; the model predicts this row
    cb 1..8                                        trail the text by 2, 3, ... frames

`WordFeed` fills the word rows while sampling. A config of this family is in configs/tiny.py. Next: tiny_clone.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from families.family import Family
from kernels.choice import device_constant
from streams import Example, Grid, StreamTable, audio_columns

MAX_AGE = 63        # frames since the word began, clamped
NO_WORD = 0         # id in the word rows where there is no next or previous word


def word_rows(words: Tensor, index: Tensor, age: Tensor) -> Tensor:
    """The four text rows that an aligned word layout reads: word, next, previous, age.

    words (..., n) ids; index (..., T) which word is spoken, -1 before the first; age (..., T) frames since it began.
    -> (..., 4, T). Training calls it with whole rows, the sampler with one frame.
    """
    padded = torch.constant_pad_nd(words, (2, 1), NO_WORD).unsqueeze(-2)     # index -1 and its previous word read NO_WORD
    place = index.unsqueeze(-2) + device_constant((2, 3, 1), index.device)[:, None]      # the word, the next and the previous one
    return torch.cat([padded.expand(*place.shape[:-1], -1).gather(-1, place), age.clamp(max=MAX_AGE).unsqueeze(-2)], dim=-2)


def words_grid(example: Example, table: StreamTable) -> Grid:
    """Word-aligned text to speech (tiny): rows word, next, previous, age, advance, then the codebooks.

    `advance` is 1 in the frame where a word begins and is trained wherever the sampler will have to decide: after the
    first word began and while another one is left. Audio rows trail the text by their delays and end with one EOS each.
    Without `codes` the grid is the prompt: the start column.
    """
    if example.codes is None:
        return table.column("start"), torch.zeros(len(table), 1)
    tokens, weights = audio_columns(example.codes, 1.0, table)
    frames, starts = torch.arange(tokens.shape[1] - 1), example.starts.tolist()
    begun = torch.searchsorted(example.starts, frames, right=True)               # (S - 1,) words that have begun
    age = frames - torch.cat([frames[:1], example.starts]).index_select(0, begun)
    tokens[:4, 1:] = word_rows(example.text, begun - 1, age)
    tokens[4, 1:] = (age == 0) & (begun > 0)
    weights[4, starts[0] + 2 : starts[-1] + 2] = 1
    return tokens, weights


class WordFeed:
    """Fill the word rows while sampling: a predicted `advance` moves an item on to its next word.

    words: ids (n,) of each of the B items. A word is left after MAX_AGE frames even when the model would stay. `state` is
    what a column changes, in place.
    """

    def __init__(self, words: Sequence[Tensor], table: StreamTable) -> None:
        self.words = torch.nn.utils.rnn.pad_sequence(list(words), batch_first=True, padding_value=NO_WORD)   # (B, n)
        self.last = torch.tensor([len(w) - 1 for w in words])
        self.state = [torch.full_like(self.last, -1), torch.zeros_like(self.last)]                           # index and age (B,)

    def to(self, device: torch.device) -> "WordFeed":
        self.words, self.last, *self.state = (t.to(device) for t in (self.words, self.last, *self.state))
        return self

    def place(self, row: int, other: "WordFeed") -> None:
        """Let an item go on as the only item of another feed does."""
        grown = max(0, other.words.shape[1] - self.words.shape[1])
        self.words = torch.nn.functional.pad(self.words, (0, grown), value=NO_WORD)
        self.words[row] = NO_WORD
        self.words[row, : other.words.shape[1]] = other.words[0]
        for own, taken in zip((self.last, *self.state), (other.last, *other.state), strict=True):
            own[row] = taken[0]

    def __call__(self, column: Tensor) -> Tensor:
        """Complete a column (B, K) whose `advance` row holds what was sampled."""
        index, age = self.state
        moved = ((column[:, 4] == 1) | (index < 0) | (age >= MAX_AGE)) & (index < self.last)
        index.add_(moved)
        age.add_(1).masked_fill_(moved, 0)
        column[:, :4] = word_rows(self.words, index[:, None], age[:, None])[..., 0]
        column[:, 4] = moved
        return column

    def may_end(self) -> Tensor:
        """Which items (B,) have begun their last word: only they may close their audio rows."""
        return self.state[0] == self.last


FAMILIES = (Family("tiny", "words", "embedded: aligned text to speech on a CPU (configs/tiny.py)", words_grid, feed=WordFeed,
                   text_to_speech=True, token_rows=3),)
