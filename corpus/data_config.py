"""DataConfig: the options of a data set, from its sources to the packed rows of a batch. Next: manifest.py."""

import re
from dataclasses import dataclass

from audio.augment import AugmentConfig
from options import check_types
from text.normalisers import check_normaliser
from text.word_times import INTERLEAVERS

# What shapes a prompt: a checkpoint remembers it, and sampling does as training did.
PROMPT_FIELDS = ("codec", "tokenizer", "normaliser", "system", "scene", "reference_in", "thought", "interleaver", "contextual", "spaces")


@dataclass(frozen=True)
class DataConfig:
    """The sources of a data set, and how examples become packed rows of a batch."""

    sources: tuple[str, ...] = ()           # manifests or folders to read, each "path" or "path:weight" (default weight 1)
    cache: str = "out/cache"                # folder of the token cache
    codec: str = "tiny"                     # audio codec: its name, a file or a hub id
    tokenizer: str = "bytes"                # text tokenizer: "bytes", a word list (.json), a SentencePiece .model, or a tokenizer.json
    normaliser: str = "none"                # text normalisers: "none", "english-v1", "arabic-v1", "higgs-v1", joined by +
    variants: int = 1                       # encoded versions of a clip; all but the first get a random shift, gain, speed and noise
    augment: AugmentConfig | None = None    # dialogues: augmentation of the variants after the first, in place of the default one
    split: str = "hash"                     # how validation rows are chosen: "hash" of the id, "speaker", or "manifest" (field "split")
    held_out: float = 0.05                  # fraction of the rows (or speakers) held out for validation when split is hash or speaker
    columns: int = 1200                     # length of one packed row, in columns; longer examples are left out
    window: int = 256                       # number of examples that are packed into rows at a time
    max_seconds: float = 30.0               # longest clip in seconds; longer ones are left out
    min_seconds: float = 0.2                # shortest clip in seconds; shorter ones are left out
    doubtful: str = "keep"                  # recordings that may be faulty (silence, clipping, noise): "keep" and name them, or "drop"
    max_text: int = 0                       # largest number of text tokens in an example; longer ones are left out; 0 = no limit
    reference: float = 0.0                  # probability that an example gets another clip of its speaker as voice reference, 0 to 1
    reference_in: str = "assistant"         # conversations: place of the voice reference, an "assistant" turn or the "system" message
    scene: str = ""                         # conversations: scene description for rows that have none
    system: str = ""                        # conversations: system message for rows that have none; "" = the default of the family
    thought: str = ""                       # conversations: thinking block before a reply, "empty" or "none"; "" = as in the chat template
    assistant_text: str = "drop"            # voice cloning in one turn: "drop" or "keep" the text before the speech of the answer
    agent: str = ""                         # dialogues: label of the agent in the alignments; "" = SPEAKER_MAIN, A in lists of objects
    chunk_seconds: float = 100.0            # dialogues: largest chunk in seconds; longer dialogues are cut into equal chunks
    interleaver: str = "queue"              # dialogues: "queue" keeps every text token, "reference" drops those later than the next word
    contextual: bool = False                # dialogues: tokenize whole sentences instead of single words
    spaces: bool = True                     # dialogues: put spaces between the words of a sentence
    both_speakers: bool = False             # dialogues: also train with the channels swapped, so that the user's side is the agent
    text_padding_weight: float = 0.5        # dialogues: loss weight of padding in the text row
    stream_weights: tuple[float, ...] = ()  # factor on the loss weights of each row of the grid, in order; () = 1 for all
    seed: int = 0                           # random seed of sampling, shuffling, variants and voice references
    workers: int = 0                        # number of clips encoded in parallel by prepare, one thread each; 0 = all cores, at most 8
    prefetch: int = 4                       # number of batches that a background thread builds ahead; 0 = no thread
    allow_outside: bool = False             # let manifests name files outside their own folder

    def __post_init__(self) -> None:
        check_types(self)
        try:
            check_normaliser(self.normaliser)
        except ValueError as error:
            raise AssertionError(error) from None
        assert min(self.variants, self.columns, self.window) > 0, "variants, columns and window are at least 1"
        assert max(self.columns, self.window) <= 2**24 and self.variants <= 1000, "columns and window are at most 2^24, variants 1000"
        assert max(self.workers, self.prefetch) <= 4096, "workers and prefetch are at most 4096"
        assert min(self.workers, self.prefetch) >= 0, "workers and prefetch are not negative"
        assert 0 <= self.held_out < 1 and 0 <= self.reference <= 1, "held_out is in [0, 1), reference in [0, 1]"
        assert self.reference_in in ("assistant", "system"), f"reference_in {self.reference_in!r} is neither assistant nor system"
        assert self.thought in ("", "empty", "none"), f"thought {self.thought!r} is neither empty nor none"
        assert self.assistant_text in ("drop", "keep"), f"assistant_text {self.assistant_text!r} is neither drop nor keep"
        assert self.doubtful in ("keep", "drop"), f"doubtful {self.doubtful!r} is neither keep nor drop"
        assert 0 <= self.min_seconds <= self.max_seconds, "min_seconds is at most max_seconds"
        assert self.interleaver in INTERLEAVERS, f"interleaver {self.interleaver!r} is none of {', '.join(INTERLEAVERS)}"
        assert self.chunk_seconds > 0 <= self.text_padding_weight, "chunk_seconds is positive, text_padding_weight not negative"


def source_weight(source: str) -> tuple[str, float]:
    """Split "path:weight"; without a number behind the last colon the weight is 1."""
    path, _, number = source.rpartition(":")
    return (path, float(number)) if path and re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) else (source, 1.0)
