"""Write assets/tiny_tokenizer.json, tiny_qwen_tokenizer.json and tiny_marks_tokenizer.json, small files in the formats of official ones.

    python assets/build_tokenizer.py

The first has the special tokens of Higgs Audio v2: a byte-level BPE without merges, ids 0..255 are bytes, so it knows
every script. The second is made as that of Qwen3: NFC, the same cutting into words, a byte-level BPE whose few merges are
learnt from the texts of the bundled recordings, then the same added tokens in the same order. The third has the bytes of the
first, and the special tokens of families that have tokenizers of their own: Higgs Audio v3, and Orpheus up to the first code.
The smoke twins of the configs and the tests read them; the released models bring their own tokenizer.json.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from corpus.swap_tokenizer import byte_level_alphabet  # noqa: E402  (the root has to be on the path first)

SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
    "<|recipient|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|generation_instruction_start|>",
    "<|generation_instruction_end|>", "<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>"]
MARKS = ["<|tts|>", "<|ref_text|>", "<|ref_audio|>", "<|text|>", "<|audio|>",
         "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *(f"<custom_token_{n}>" for n in range(11))]       # codes follow the last
QWEN = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_PLAIN = [              # added, but no special tokens: decoding shows them
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>"]
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def plain(specials: list[str]) -> Tokenizer:
    """A byte-level BPE without merges, and special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_level_alphabet(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return tokenizer


def qwen(texts: list[str], size: int = 512) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(byte_level_alphabet()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in QWEN])
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in QWEN_PLAIN])
    return tokenizer


def bundled_texts() -> list[str]:
    lines = [line for name in ("manifest", "arabic") for line in (ASSETS / "speech" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    return [text for row in rows if "text" in row for text in (row["text"], row["text"].capitalize() + ".\n")]


if __name__ == "__main__":
    for name, tokenizer in (("tiny_tokenizer", plain(SPECIALS)), ("tiny_qwen_tokenizer", qwen(bundled_texts())),
                            ("tiny_marks_tokenizer", plain(MARKS))):
        path = ASSETS / f"{name}.json"
        tokenizer.save(str(path))
        print(f"{path}: {path.stat().st_size} bytes, {tokenizer.get_vocab_size()} ids")
