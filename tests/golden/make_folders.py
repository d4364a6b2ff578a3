"""Write tests/golden/folders: tiny models as the official loaders save them, with the files that stand around released weights.

    python tests/golden/make_folders.py                              torch 2.13.0, transformers 5.24.0, peft 0.21.2, moshi 0.2.13
    python tests/golden/make_folders.py boson                        environment B of make.py
    PYTHONPATH=CHECKOUT python tests/golden/make_folders.py dsaa     environment of make_dsaa.py, behind qwen2

Keys and ids stand in the order of the released repositories. `expected.json` holds a prompt and what the official class
and its generation_config.json make of it, greedily. Read by tests/families/test_official_folders.py.
"""

import json
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import numpy as np
import torch
from make import scramble
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "assets"
END, START, CLOSE = 512, 513, 514               # <|endoftext|> <|im_start|> <|im_end|> of the tiny tokenizer
# The released repositories' own: Qwen2.5-1.5B-Instruct and Qwen3-1.7B. The order of eos_token_id is theirs.
GENERATION = {"qwen2": {"bos_token_id": END, "pad_token_id": END, "do_sample": True, "eos_token_id": [CLOSE, END],
                        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
              "qwen3": {"bos_token_id": END, "do_sample": True, "eos_token_id": [CLOSE, END], "pad_token_id": END,
                        "temperature": 0.6, "top_k": 20, "top_p": 0.95}}
CHATML = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def qwen(name: str, folder: Path) -> None:
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config = kinds[name][0](vocab_size=544, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                            num_key_value_heads=1, head_dim=8, max_position_embeddings=1024, rope_theta=1e6, tie_word_embeddings=True,
                            bos_token_id=END, eos_token_id=CLOSE, attn_implementation="eager")
    model = scramble(kinds[name][1](config), 1)
    model.generation_config = GenerationConfig(**GENERATION[name])
    model.save_pretrained(folder)
    write(folder / "generation_config.json", GENERATION[name])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny_qwen_tokenizer.json"), eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Where is my order?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=16, attention_mask=torch.ones_like(ids))
    write(folder / "expected.json", {"ids": ids[0].tolist(), "tokens": out[0, ids.shape[1]:].tolist()})


def higgs(name: str, folder: Path) -> None:
    """As convert_higgs of transformers leaves it: RAS lives in generation_config.json, the chat template in the processor's files."""
    from transformers import GenerationConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast
    ids = {t["content"]: t["id"] for t in json.loads((ASSETS / "tiny_tokenizer.json").read_text())["added_tokens"]}
    config = HiggsAudioV2Config(
        vocab_size=288, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=2048, num_codebooks=8, codebook_size=258, audio_stream_bos_id=256, audio_stream_eos_id=257,
        audio_bos_token_id=ids["<|audio_out_bos|>"], audio_eos_token_id=ids["<|audio_eos|>"],
        audio_token_id=286, audio_delay_token_id=287, eos_token_id=ids["<|eot_id|>"],
        bos_token_id=1, pad_token_id=ids["<|end_of_text|>"], attn_implementation="eager")
    model = scramble(HiggsAudioV2ForConditionalGeneration(config, use_text_head=True), 2).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=ids["<|eot_id|>"], pad_token_id=ids["<|end_of_text|>"],
                                               ras_win_len=7, ras_win_max_num_repeat=2, use_text_head=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny_tokenizer.json"), eos_token="<|eot_id|>", pad_token="<|end_of_text|>",
                            chat_template="{{ messages }}").save_pretrained(folder)
    write(folder / "processor_config.json", {"processor_class": "HiggsAudioV2Processor", "audio_stream_bos_id": 256,
                                             "audio_stream_eos_id": 257})


def csm(name: str, folder: Path) -> None:
    """CSM and its Mimi in one file, a processor, rules of the depth transformer in generation_config.json."""
    from make import csm_model
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    ids = {t["content"]: t["id"] for t in json.loads((ASSETS / "tiny_tokenizer.json").read_text())["added_tokens"]}
    begin = ids["<|begin_of_text|>"]
    model = csm_model(3, 16, 12, 4, 258, 2, 16, text_vocab_size=288, bos_token_id=begin, audio_token_id=begin + 2,
                      audio_eos_token_id=begin + 3, pad_token_id=begin + 2).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=begin, pad_token_id=begin + 2, do_sample=True, temperature=0.9, top_k=50)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny_tokenizer.json"), bos_token="<|begin_of_text|>", pad_token="<|end_of_text|>",
                            chat_template="{{ messages }}").save_pretrained(folder)
    write(folder / "processor_config.json", {"processor_class": "CsmProcessor"})


def boson(name: str, folder: Path) -> None:
    """The first release. Its own server reads the folder again and speaks; a codec of another repository stands in there."""
    from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
    from transformers import PreTrainedTokenizerFast
    for module in ("librosa", "pandas", "boson_multimodal.audio_processing.higgs_audio_tokenizer"):      # imported, not used on this way
        sys.modules[module] = module_from_spec(ModuleSpec(module, None))
    codec = types.SimpleNamespace(tps=25, sampling_rate=24000, decode=lambda codes: np.zeros((1, 1, codes.shape[-1] * 960)))
    sys.modules[module].load_higgs_audio_tokenizer = lambda *_, **__: codec
    from boson_multimodal.data_types import ChatMLSample, Message
    from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
    ids = {t["content"]: t["id"] for t in json.loads((ASSETS / "tiny_tokenizer.json").read_text())["added_tokens"]}
    text = {"model_type": "llama", "vocab_size": 288, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                     "original_max_position_embeddings": 8192},
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": ids["<|eot_id|>"]}
    config = HiggsAudioConfig(
        text_config=text, audio_adapter_type="dual_ffn_fast_forward", audio_dual_ffn_layers=[0, 1], audio_num_codebooks=8,
        audio_codebook_size=256, audio_stream_bos_id=256, audio_stream_eos_id=257, audio_in_token_idx=ids["<|AUDIO|>"],
        audio_out_token_idx=ids["<|AUDIO_OUT|>"], audio_out_bos_token_id=ids["<|audio_out_bos|>"], audio_eos_token_id=ids["<|audio_eos|>"],
        pad_token_id=ids["<|end_of_text|>"], encode_whisper_embed=False, skip_audio_tower=True, encode_audio_in_tokens=True,
        use_delay_pattern=True)
    config.hidden_size = 16
    model = scramble(HiggsAudioModel(config), 4, gain=1.6).to(torch.bfloat16)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny_tokenizer.json"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                            pad_token="<|end_of_text|>").save_pretrained(folder)
    engine = HiggsAudioServeEngine(str(folder), "", device="cpu", torch_dtype=torch.float32, kv_cache_lengths=[256])
    sample = ChatMLSample(messages=[Message("system", "Generate audio following instruction."), Message("user", "Where is my order?")])
    prompt = engine._prepare_inputs(sample, force_audio_gen=True)["input_ids"][0]
    found = engine.generate(sample, max_new_tokens=40, temperature=0.0, force_audio_gen=True, ras_win_len=0)
    write(folder / "expected.json", {"ids": prompt.tolist(), "columns": found.generated_audio_tokens.tolist()})


def dsaa(name: str, folder: Path) -> None:
    """As the checkpointer of slavivo/dsaa leaves a run on Moshi's own config.json, with the Qwen of folders/qwen2 beside it.

    That config.json says nothing of the text model: what its train.py made of it (ids, projectors of these widths) is bound here.
    `text_llm` is the one key that a person adds.
    """
    import modules
    import moshi.models.lm as lm
    import torch.distributed as dist
    from finetune.checkpointing import Checkpointer
    from make_dsaa import DA, DD, MOSHI, H
    from make_dsaa import scramble as draw
    from moshi.models.loaders import get_moshi_lm
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    base = HERE / "folders/qwen2"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))      # 4.57 does not know the class of 5.24

    def text_model() -> torch.nn.Module:                # 4.57 does not read the rope_parameters of 5.24
        return AutoModelForCausalLM.from_pretrained(base, rope_theta=1e6, output_hidden_states=True, attn_implementation="eager",
                                                    torch_dtype=torch.float32)

    llm = text_model()
    DT = llm.config.hidden_size
    lm.TextPreservingProjector = lambda *_: modules.TextPreservingProjector(DT, DA, H, DT)
    lm.ResidualProjector = lambda *_: modules.ResidualProjector(DT + DA + DD, H, DD)
    about = {k: v for k, v in MOSHI.items() if not k.startswith("existing")} | {                  # codes as of codec tiny:2
        "n_q": 4, "dep_q": 2, "card": 256, "depformer_context": 2, "delays": [0, 0, 1, 0, 1], "existing_text_padding_id": 3,
        "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_name": "tokenizer_spm_32k_3.model",
        "lora": False, "lora_rank": 128, "lora_scaling": 2.0}
    pad = tokenizer.encode(" ")[0]
    ids = {"existing_text_padding_id": pad, "existing_text_end_padding_id": pad, "existing_bos_id": tokenizer.encode("<|im_start|>")[0]}
    lm_kwargs = {k: v for k, v in about.items() if not k.endswith("_name") and "lora" not in k} | ids
    model = draw(lm.TextLMModel(text_llm=llm, device="cpu", dtype=torch.float32, **lm_kwargs), 11)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29599", rank=0, world_size=1)
    run = folder / "run"
    writer = Checkpointer(model, types.SimpleNamespace(step=400), run, about, full_finetuning=True)
    writer.save_checkpoint(save_only_lora=False, dtype=torch.bfloat16)
    for path in writer.dst_dir.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(run)
    llm = text_model()
    again = get_moshi_lm(folder / "consolidated.safetensors", lm_kwargs, "cpu", torch.float32, llm)
    user = torch.randint(0, 256, (1, 2, 14), generator=torch.Generator().manual_seed(5))
    generator = lm.LMGen(again, use_sampling=False, temp=0.0, temp_text=0.0)
    with torch.no_grad(), generator.streaming(1):
        steps = [column[0, :, 0].tolist() for t in range(14) if (column := generator.step(user[:, :, t : t + 1])) is not None]
    write(folder / "expected.json", {"user": user[0].tolist(), "frames": steps, "ids": ids})


def orpheus(name: str, folder: Path) -> None:
    """A Llama whose vocabulary ends in the codes of codec tiny, as released but for `speech_tokens`, which says where they begin."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokens = ASSETS / "tiny_marks_tokenizer.json"
    size = 1 + max(t["id"] for t in json.loads(tokens.read_text())["added_tokens"])
    ids = {t["content"]: t["id"] for t in json.loads(tokens.read_text())["added_tokens"]}
    end = ids["<custom_token_2>"]
    config = LlamaConfig(
        vocab_size=size - 1 + 8 * 256, hidden_size=24, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=131072, tie_word_embeddings=True, bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=end, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192})
    model = scramble(LlamaForCausalLM(config), 71).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=end, do_sample=True, temperature=0.6)
    model.save_pretrained(folder)
    write(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"speech_tokens": [size - 1, 8, 256]})
    PreTrainedTokenizerFast(tokenizer_file=str(tokens), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
                            chat_template="{{ messages }}").save_pretrained(folder)


def kyutai(name: str, folder: Path) -> None:
    """As Kyutai publishes: weights of the package's own class, flat config.json that names the files beside it, a SentencePiece model.

    Codes are those of codec tiny:2; its Mimi, of one fixed size, is too large to lie here. `expected.json` is what LMGen makes of a user,
    the first frame given twice and Hibiki told to sound very good, as run_inference.py does both.
    """
    import sentencepiece
    from make import MOSHI
    from make_moshi import HIBIKI, STT, build, conditions, frames
    words = json.loads((ASSETS / "speech/words.json").read_text())
    with open(folder / "tokenizer_spm_32k_3.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words), model_writer=file, vocab_size=96, pad_id=3, byte_fallback=False, minloglevel=2,
            normalization_rule_name="identity", character_coverage=1.0, num_threads=1)
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer_spm_32k_3.model")).vocab_size()
    shape = {"moshi": MOSHI | {"delays": [0, 0, 1, 0, 1]}, "hibiki": HIBIKI | {"delays": [0, 0, 2, 0, 2]},
             "stt": STT | {"delays": [0] * 3}}[name] | {"card": 256, "text_card": size, "context": 40}
    shape |= {"n_q": 2, "dep_q": 0} if name == "stt" else {"n_q": 4, "dep_q": 2}
    model, hibiki = build(shape, 51).to(torch.bfloat16), name == "hibiki"
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    model.float()
    write(folder / "config.json", shape | {
        "model_type": name, "model_id": {"sig": "0123abcd", "epoch": 7}, "moshi_name": "model.safetensors",
        "mimi_name": "tokenizer-e351c8d8-checkpoint125.safetensors", "tokenizer_name": "tokenizer_spm_32k_3.model", "lm_gen_config": {
            "temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 25}, **({"stt_config": {
                "audio_delay_seconds": 0.5, "audio_silence_prefix_seconds": 0.0}} if name == "stt" else {})})
    user = torch.randint(0, 256, (1, 2, 14), generator=torch.Generator().manual_seed(5))
    if hibiki:                                          # what run_inference.py does before it begins is in the package's loader
        model.text_emb.weight.data[2] = model.text_emb.weight.data[3]
    told = {"condition_tensors": conditions(model, {"description": "very_good"})} if hibiki else {}
    found = frames(model, torch.cat([user[..., :1], user], 2), **told)
    write(folder / "expected.json", {"user": user[0].tolist(), "frames": found[0].mT.tolist()})


def moss(name: str, folder: Path) -> None:
    """MOSS-Speech: no package has its class, two Qwen3 that share their first layers compute what its modeling file does; its files are
    those of the released repository. Codes are those of codec tiny:1."""
    from make import moss_pair, write_moss
    from transformers import PreTrainedTokenizerFast
    tokens = json.loads((ASSETS / "tiny_qwen_tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in tokens["added_tokens"]}
    text, audio = moss_pair(2, 1, 544, 320, 61)
    about = {"modality_pad_token_id": 543, "sosp_token_id": ids["<|object_ref_start|>"], "eosp_token_id": 256,
             "eos_token_id": [CLOSE, END], "bos_token_id": END, "pad_token_id": END}
    write_moss("moss_folder", text, audio, 2, about)
    case = HERE / "moss_folder.safetensors"
    with safe_open(case, "pt") as file:
        write(folder / "config.json", json.loads(file.metadata()["config"]) | {"auto_map": {
            "AutoConfig": "configuration_moss_speech.MossSpeechConfig",
            "AutoModelForCausalLM": "modeling_moss_speech.MossSpeechForCausalLM"}})
        tensors = {key.removeprefix("weights/"): file.get_tensor(key) for key in file.keys()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    case.unlink()
    write(folder / "generation_config.json", GENERATION["qwen3"] | {"temperature": 0.7, "top_p": 0.95})
    PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tiny_qwen_tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>",
                            chat_template=CHATML).save_pretrained(folder)
    write(folder / "preprocessor_config.json", {"processor_class": "MossSpeechProcessor"})


# Of a base whose head is its embedding: one of the two trained in full, both, the head with an adapter.
TIED = {"peft_embed": {"modules_to_save": ["embed_tokens"]}, "peft_head": {"target_modules": ["q_proj", "lm_head"]},
        "peft_both": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}}


def peft(name: str, folder: Path) -> None:
    """An adapter as PEFT saves it; what it answers lies in NAME.safetensors beside the folders."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(HERE / "folders/qwen2", attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | TIED[name])))
    draw, ids = torch.Generator().manual_seed(3), torch.arange(3, 12)[None]
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            if p.requires_grad and "lm_head.modules_to_save" not in n:                    # ensure_weight_tying keeps the two equal
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
        logits = model.eval()(input_ids=ids).logits
    model.save_pretrained(folder)
    about = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "folders/qwen2"}
    write(folder / "adapter_config.json", about)
    (folder / "README.md").unlink()
    save_file({"ids": ids, "logits": logits}, HERE / f"{name}.safetensors")


MAKE = {"qwen2": qwen, "qwen3": qwen, "higgs": higgs, "csm": csm, "boson": boson, "dsaa": dsaa, "moss": moss, "orpheus": orpheus,
        **dict.fromkeys(("moshi", "hibiki", "stt"), kyutai), **dict.fromkeys(TIED, peft)}
ELSEWHERE = ("boson", "dsaa")                   # each in an environment of its own

if __name__ == "__main__":
    for name in sys.argv[1:] or [n for n in MAKE if n not in ELSEWHERE]:
        folder = HERE / "folders" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        MAKE[name](name, folder)
        if (tokens := folder / "tokenizer.json").is_file():                 # one line instead of thousands
            tokens.write_text(json.dumps(json.loads(tokens.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")
        print(name, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})
