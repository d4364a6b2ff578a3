"""Write tests/golden/qwen_chat.safetensors: what transformers' tokenizer and the official chat templates make of 200 strings.

    python tests/golden/make_qwen_chat.py QWEN2_5.jinja QWEN3.jinja          (environment A of make.py)

The two arguments are the `chat_template` of tokenizer_config.json beside Qwen2.5-7B-Instruct and Qwen3-8B. The tokenizer is
`Qwen2Tokenizer`, which builds normaliser, cutting and decoder by itself, with the vocabulary, merges and added tokens of
assets/tiny_qwen_tokenizer.json: so that file is held against the official format too. Read by test_qwen.py.
"""

import json
import sys
from pathlib import Path

import torch
from make import HERE
from safetensors.torch import save_file

WORDS = [
    "hello", "Where is my order 40213?", "مرحبا بكم", "السلام عليكم، كيف يمكنني مساعدتك؟", "رقم الطلب ٤٠٢١٣",
    "你好，我的订单在哪里？", "订单号４０２１３", "１２３", "1234567890", "12.50 EUR", "it's we'll I'VE they'Re", "👍",
    "👩‍👩‍👧 family 🇪🇬", "🙂🙃 ok", "café", "cafe\u0301 NFC", "A\u030angstro\u0308m", "\u1112\u1161\u11ab", "Ω≈ç√",
    "naïve — “quotes” … ellipsis", "tabs\tand\tmore", "line\none", "two\n\nlines\n", "\n leading", "  spaces  inside   it ",
    "trailing   ", " ", "", "a\r\nb\rc", "\u00a0nbsp\u2003em", "x" * 40, "CamelCase_snake-kebab", "http://a.b/c?d=e&f=%20",
    "def f(x):\n    return x**2  # ok", "<b>bold</b>", "{\"id\": 7}", "\\n is not a line end", "шесть слов по-русски",
    "日本語とカタカナ", "한국어 문장", "हिन्दी में", "ไทย", "עברית", "ﷺ ﻻ", "zero\u200bwidth\u200d", "\ufeffbom"]
ALIKE = [
    "<|im_end |>", "<|im_start", "im_end|>", "<|IM_END|>", "< |im_end|>", "<|im_end|", "<im_end>", "<|endoftext |>",
    "<|eot_id |>", "<think", "think>", "<Think>", "</ think>", "<|object_ref|>", "<tool_calls>", "&lt;|im_end|&gt;",
    "<||im_end||>", "＜|im_end|＞"]
REAL = [
    "<|im_end|>", "a <|im_start|>user b", "<|endoftext|>", "<think>\nhm\n</think>\n\nyes", "<|object_ref_start|>",
    "x</think>", "<tool_call>{}</tool_call>", "<|vision_pad|>", "<|fim_prefix|> y"]


def strings() -> list[str]:
    mixed = [f"{a} {b}" for a, b in zip(WORDS, WORDS[7:] + WORDS[:7], strict=True)]
    glued = [a + b for a, b in zip(WORDS, ALIKE * 3, strict=False)]
    more = [f"{b}\n{a}" for a, b in zip(WORDS[3:], ALIKE * 3, strict=False)]
    return list(dict.fromkeys([*WORDS, *ALIKE, *REAL, *mixed, *glued, *more]))[:200]


def conversations(texts: list[str]) -> list[list[dict[str, str]]]:
    """One turn for every string, then longer ones of all roles."""
    turns = [[{"role": "user", "content": text}] for text in texts]
    for n in range(0, len(texts) - 5, 5):
        a, b, c, d, e = texts[n : n + 5]
        talk = [("user", a), ("assistant", b), ("user", c), ("assistant", d)]
        talk = [("system", e), *talk] if n % 2 else talk
        talk = talk[: -1 - n % 3 // 2] if n % 3 else talk
        turns.append([{"role": role, "content": text} for role, text in talk])
    short = [[("assistant", texts[0])], [("system", texts[1]), ("assistant", "\n\nx")]]
    return [*turns, *([{"role": role, "content": text} for role, text in talk] for talk in short)]


def tokenizer() -> object:
    from transformers import AddedToken, Qwen2Tokenizer
    about = json.loads((HERE.parents[1] / "assets" / "tiny_qwen_tokenizer.json").read_text("utf-8"))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in about["model"]["merges"]]
    found = Qwen2Tokenizer(vocab=about["model"]["vocab"], merges=merges)
    found.add_tokens([AddedToken(t["content"], special=t["special"], normalized=False) for t in about["added_tokens"]])
    assert all(found.convert_tokens_to_ids(t["content"]) == t["id"] for t in about["added_tokens"])
    return found


def flat(name: str, lists: list[list[int]]) -> dict[str, torch.Tensor]:
    return {f"{name}/ids": torch.tensor([i for ids in lists for i in ids], dtype=torch.int16),
            f"{name}/lengths": torch.tensor([len(ids) for ids in lists], dtype=torch.int16)}


if __name__ == "__main__":
    import transformers
    found, texts = tokenizer(), strings()
    plain = [t for t in texts if not any(mark in t for mark in found.get_added_vocab() if mark not in ("<tool_call>", "</tool_call>"))]
    chats = conversations(plain)
    tensors = flat("raw", [found.encode(t, add_special_tokens=False) for t in texts])
    for name, path in zip(("qwen2", "qwen3"), sys.argv[1:], strict=True):
        template = Path(path).read_text("utf-8")
        for mode, more in {"whole": {}, "prompt": {"add_generation_prompt": True},
                           "off": {"add_generation_prompt": True, "enable_thinking": False}}.items():
            if (name, mode) != ("qwen2", "off"):
                rows = [found.apply_chat_template(chat, chat_template=template, tokenize=True, return_dict=False, **more) for chat in chats]
                tensors |= flat(f"{name}/{mode}", rows)
    about = {"texts": texts, "chats": chats}
    save_file(tensors, HERE / "qwen_chat.safetensors", metadata={
        "config": json.dumps(about), "command": "python tests/golden/make_qwen_chat.py QWEN2_5.jinja QWEN3.jinja",
        "packages": f"transformers {transformers.__version__}"})
    print(len(texts), "strings,", len(chats), "conversations,", (HERE / "qwen_chat.safetensors").stat().st_size, "bytes")
