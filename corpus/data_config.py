"""DataConfig: the options of a data set, from its sources to the packed rows of a batch. Next: manifest.py."""

from dataclasses import dataclass

from audio.augment import AugmentConfig
from options import check_types
from text.normalisers import check_normaliser
from text.word_times import INTERLEAVERS

# What shapes a prompt: a checkpoint remembers it, and sampling does as training did.
PROMPT_FIELDS = ("codec", "tokenizer", "normaliser", "system", "scene", "reference_in", "thought", "interleaver", "contextual", "spaces")


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become rows of a batch."""

    sources: tuple[str, ...] = ()           # manifests or folders, each "path" or "path:weight"
    cache: str = "out/cache"                # folder of the token cache
    codec: str = "tiny"                     # name, file or hub id of the codec
    tokenizer: str = "bytes"                # "bytes", a word list (.json), a SentencePiece .model, or a tokenizer.json
    normaliser: str = "none"                # "none", "english-v1", "arabic-v1", "higgs-v1", joined by +; stored in the checkpoint
    variants: int = 1                       # encoded versions of a clip: shift < 1 frame, 3 dB, 6 % speed, noise; the first is unchanged
    augment: AugmentConfig | None = None    # dialogues: augmentation of the variants after the first, instead
    split: str = "hash"                     # "hash", "speaker" or "manifest" (the rows' own "split")
    held_out: float = 0.05                  # fraction for validation under hash and speaker
    columns: int = 1200                     # columns of one packed row
    window: int = 256                       # examples in the buffer of first-fit packing
    max_seconds: float = 30.0               # seconds; longer clips are left out
    min_seconds: float = 0.2                # seconds; shorter clips are left out
    max_text: int = 0                       # rows whose text has more ids are left out, 0 = no limit
    reference: float = 0.0                  # probability of another clip of the same speaker as a voice reference
    reference_in: str = "assistant"         # conversations: put the reference in an "assistant" turn or in the "system" message
    scene: str = ""                         # conversations: scene description of rows without one
    system: str = ""                        # conversations: system message of rows without one, "" = the family's own
    thought: str = ""                       # conversations: "empty" or "none" before a reply, "" = as the tokenizer's chat template says
    assistant_text: str = "drop"            # one-turn clone requests: "drop" or "keep" the text before the answer's speech
    chunk_seconds: float = 100.0            # dialogues: longer ones are cut evenly into chunks of at most this many seconds
    interleaver: str = "queue"              # dialogues: "queue" keeps every token, "reference" drops those that the next word overtakes
    contextual: bool = False                # dialogues: tokenize whole sentences, not word by word
    spaces: bool = True                     # dialogues: words of a sentence are joined by spaces
    both_speakers: bool = False             # dialogues: also train on the user's side as the agent, channels swapped
    text_padding_weight: float = 0.5        # dialogues: target weight of padding in the text row
    stream_weights: tuple[float, ...] = ()  # factor on the target weights of each row of the grid; () = ones
    seed: int = 0                           # of sampling, shuffling, variants and references
    workers: int = 0                        # clips that prepare encodes in parallel, one thread each; 0 = 1
    prefetch: int = 4                       # batches built ahead by a thread; 0 = none
    allow_outside: bool = False             # manifests may name files outside their folder

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
        assert 0 <= self.min_seconds <= self.max_seconds, "min_seconds is at most max_seconds"
        assert self.interleaver in INTERLEAVERS, f"interleaver {self.interleaver!r} is none of {', '.join(INTERLEAVERS)}"
        assert self.chunk_seconds > 0 <= self.text_padding_weight, "chunk_seconds is positive, text_padding_weight not negative"
