"""Write assets/tiny_tokenizer.json: bytes, and the special tokens of Higgs Audio v2 under their official names.

    python assets/build_tokenizer.py

A byte-level BPE without merges: ids 0..255 are bytes, so it knows every script; the specials follow. The smoke twins of
the Higgs configs and the tests read it; the released model brings its own tokenizer.json.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
    "<|recipient|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|generation_instruction_start|>",
    "<|generation_instruction_end|>", "<SE>", "</SE>", "<SE_s>", "</SE_s>", "<SE_e>", "</SE_e>"]


def byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte (GPT-2): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


if __name__ == "__main__":
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(byte_letters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    path = Path(__file__).parent / "tiny_tokenizer.json"
    tokenizer.save(str(path))
    print(f"{path}: {path.stat().st_size} bytes, {tokenizer.get_vocab_size()} ids")
