"""Qwen2.5 and Qwen3, text models: sizes, chat templates, the layout of transformers. Plain text is laid out here, too.

    <|im_start|>system       Qwen2.5 adds a default system turn if there is none; Qwen3 does not
    <|im_start|>user         the question<|im_end|>
    <|im_start|>assistant    the reply<|im_end|>               trained; in Qwen3 only the last reply, after an empty reasoning block

Sources: the released config.json files; the chat templates beside Qwen2.5 and Qwen3; transformers 5.23 (qwen2, qwen3).
Next: dsaa.py.
"""

from dataclasses import replace

from families.family import Family
from families.formats import About, Format, Tensors, by_model_type, drop_buffers, ids, llama, stack, write_llama
from layers.architecture import ModelConfig, StackConfig
from streams import Stream, StreamTable, chat_grid, text_grid
from text.conversation import THOUGHTS, Template


def qwen(layers: int, dim: int, ffn: int, heads: int, kv_heads: int, generation: int, head: int = 128, vocab: int = 151936,
         tied: bool = True) -> ModelConfig:
    """A text model of the second generation (biases on q, k, v) or of the third (norms on q and k)."""
    second = generation == 2
    return ModelConfig(
        StreamTable((Stream("text", "text", vocab, vocab),), f"qwen{generation}", stop=(151643, 151645)),
        StackConfig(dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head if head * heads != dim else 0, ffn=ffn,
                    norm_eps=1e-6, rope_theta=1e6, qkv_bias=second, qk_norm=not second), tied=tied)


QWEN2_5_0_5B = qwen(24, 896, 4864, 14, 2, generation=2, head=64)
QWEN2_5_1_5B = qwen(28, 1536, 8960, 12, 2, generation=2)
QWEN2_5_3B = qwen(36, 2048, 11008, 16, 2, generation=2)
QWEN2_5_7B = qwen(28, 3584, 18944, 28, 4, generation=2, vocab=152064, tied=False)
QWEN3_0_6B = qwen(28, 1024, 3072, 16, 8, generation=3)
QWEN3_1_7B = qwen(28, 2048, 6144, 16, 8, generation=3)
QWEN3_4B = qwen(36, 2560, 9728, 32, 8, generation=3)
QWEN3_8B = qwen(36, 4096, 12288, 32, 8, generation=3, tied=False)

# ---- how turns are written ----

SOSP = "<|object_ref_start|>"                       # what MOSS-Speech opens speech with; a mark of pictures in Qwen
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2_TEMPLATE = Template(
    "Qwen2.5", "<|im_start|>{role}\n", "<|im_end|>", "<|endoftext|>", CHATML, (*CHATML, SOSP, *THOUGHTS), separator="\n", joint_header=True,
    system=("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",) * 2)
# Qwen3's template puts the empty reasoning block only before the last reply, so only that one is trained.
QWEN3_TEMPLATE = replace(QWEN2_TEMPLATE, family="Qwen3", system=("", ""), empty_thinking="<think>\n\n</think>\n\n", targets="last")


# ---- the layout of transformers ----

NAMES = (("embed.text.weight", "model.embed_tokens.weight"), *stack("temporal.layers", "model.layers"),
        ("temporal.norm.weight", "model.norm.weight"), ("text_head.weight", "lm_head.weight"))


def read_qwen(about: About, tensors: Tensors) -> ModelConfig:
    kind, words = about["model_type"], about["vocab_size"]
    second = kind == "qwen2"
    table = StreamTable((Stream("text", "text", words, words),), kind, stop=ids(about.get("eos_token_id")))
    return ModelConfig(table, llama(about, about["num_hidden_layers"], 1e-6, qkv_bias=second, qk_norm=not second),
                       tied=about.get("tie_word_embeddings", False))


def write_qwen(c: ModelConfig, dtype: str) -> About:
    kind = "qwen2" if c.temporal.qkv_bias else "qwen3"
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, **write_llama(c, c.temporal.layers, dtype),
            "eos_token_id": list(c.table.stop) or None, "max_position_embeddings": 32768, "use_sliding_window": False}


FORMAT = Format("qwen", "hf", lambda c: NAMES, read_qwen, write_qwen, lambda c: not c.table.codes, by_model_type("qwen2", "qwen3"),
                drop_buffers, shards=True, peft=True, task_type="CAUSAL_LM")
FAMILIES = (
    Family("plain text", "text", "text without turns", text_grid),
    Family("Qwen2.5", "qwen2", "Qwen2.5 0.5B to 7B: conversations in text", chat_grid, QWEN2_TEMPLATE, formats=(FORMAT,)),
    Family("Qwen3", "qwen3", "Qwen3 0.6B to 8B: conversations in text", chat_grid, QWEN3_TEMPLATE))
