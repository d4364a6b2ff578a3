"""What stands around official weights and goes along with them: tokenizer files, generation_config.json, chat template, preprocessor.

    remember(base, checkpoint / "official")        a checkpoint of ours keeps the small files of the folder that it began with
    carry(base, out, about, ...)                   an export gets them back, and of config.json what we have no field for

Weights, adapters and the README of the base stay behind.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from families.formats import About, config_file, ids, official_files
from options import read_json, read_object, write_json
from streams import StreamTable
from system.files import copy_file

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
LEFT = ("config.json", "moshi_lm_kwargs.json", "adapter_config.json", "README.md")
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")        # how names of its files begin
# Facts of a base that no weight shows; ours are the class's defaults. All ids that end a text are in generation_config.json.
ITS_OWN = ("eos_token_id", "max_position_embeddings", "bos_token_id", "pad_token_id", "initializer_range", "max_window_layers",
           "sliding_window", "audio_in_token_idx", "audio_out_token_idx", "audio_token_id", "audio_delay_token_id")
# What our own fields say in another way, or what was true of the base only.
STALE = ("rope_parameters", "rope_scaling", "rope_theta", "dtype", "torch_dtype", "transformers_version", "quantization_config",
         "_name_or_path", "transformers_weights", "moshi_name", "lora_name", "lora_rank", "lora_scaling")
MOST = 64 << 20     # bytes


def small_files(folder: Path) -> list[Path]:
    """The files of a folder but its weights and its config.json."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in LEFT
            and not path.name.startswith(".") and path.stat().st_size <= MOST]


OURS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "ras_win_len": "ras_window",
        "ras_win_max_num_repeat": "ras_repeats", "repetition_penalty": "repetition_penalty"}
GENERATION = {f"{name}?": int | float | None for name in OURS} | {"eos_token_id?": int | list | None}
WITHOUT = {"no_repeat_ngram_size": 0, "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0}


def generation_config(folder: Path) -> About:
    file = folder / "generation_config.json"
    return read_object(file, "fetch it again", **GENERATION) if file.is_file() else {}


def sampling_rules(folder: Path, table: StreamTable, say: Callable[[str], Any]) -> dict[str, Any]:
    """How the files beside official weights want to be sampled: generation_config.json, or lm_gen_config of a config of moshi's."""
    about = generation_config(folder)
    rules = {ours: about[theirs] for theirs, ours in OURS.items() if about.get(theirs) is not None}
    Q = len(table.codes_out)
    for ours, theirs in (("temperature", "subtalker_temperature"), ("top_k", "subtalker_top_k"), ("top_p", "subtalker_top_p")):
        if theirs in about and ours in rules:                              # Qwen3-TTS: of the codebooks behind the first
            rules[ours] = (float(rules[ours]), *[float(about[theirs])] * (Q - 1))
    if about.get("do_sample") is False and rules.keys() & {"temperature", "top_k", "top_p"}:
        rules["temperature"] = 0.0
    if ignored := [f"{key} {about[key]}" for key, none in WITHOUT.items() if about.get(key) not in (None, none)]:
        say(f"generation_config.json asks for {', '.join(ignored)}, which is not done here")
    told = read_object(config_file(folder), "fetch it again", **{"lm_gen_config?": dict | None}).get("lm_gen_config") or {}
    Q = len(table.audio_out)
    if told.keys() & {"temp", "temp_text", "use_sampling"}:
        greedy = told.get("use_sampling") is False
        rules["temperature"] = 0.0 if greedy else (told.get("temp_text", 0.7), *[told.get("temp", 0.8)] * Q)
    if told.keys() & {"top_k", "top_k_text"}:
        rules["top_k"] = (float(told.get("top_k_text", 25)), *[float(told.get("top_k", 250))] * Q)
    rules |= {"cfg": told["cfg_coef"]} if "cfg_coef" in told else {}
    if strange := told.keys() - {"temp", "temp_text", "use_sampling", "top_k", "top_k_text", "cfg_coef"}:
        say(f"config.json has lm_gen_config {', '.join(sorted(strange))}, which is not done here")
    return rules


def remember(source: Path, folder: Path) -> None:
    """Copy what stands around official weights, config.json too."""
    for path in [*small_files(source), config_file(source)]:
        copy_file(path, folder / path.name)


def carry(source: Path, out: Path, about: About | None, stop: Sequence[int], tokenizer: Path | None) -> None:
    """Write the files around a base beside an export of a model that began there.

    `about` is the export's config.json where its layout is the base's: it gets the base's own facts. `stop` are the ids that end a
    text, `tokenizer` the file that the run used: where it is another than the base's, the base's stays behind.
    """
    files = small_files(source)
    own = next((path for path in files if tokenizer is not None and path.name == tokenizer.name), None)
    if tokenizer is not None and not same_pieces(source, tokenizer) and (own is None or own.read_bytes() != tokenizer.read_bytes()):
        files = [path for path in files if not path.name.startswith(TOKENIZER) and path.suffix != ".model"] + [tokenizer]
    for path in files:
        copy_file(path, out / path.name)
    known = ids((found := generation_config(out)).get("eos_token_id"))
    if found and (more := [i for i in stop if i not in known]):
        write_json(out / "generation_config.json", found | {"eos_token_id": [*known, *more]})
    if about is None:
        return
    base = read_json(config_file(source))
    write_json(out / "config.json", joined(base, about))
    elsewhere = base.get("mimi_name") and not (source / base["mimi_name"]).is_file()       # trainers leave the codec where it was
    codec = None if elsewhere else official_files(source, ("tokenizer",)).get("codec")
    if codec and Path(codec).parent == source:
        for path in sorted(Path(codec).iterdir()) if Path(codec).is_dir() else [Path(codec)]:
            (out / path.relative_to(source)).parent.mkdir(exist_ok=True)
            copy_file(path, out / path.relative_to(source))


def one_end(about: About, out: Path) -> About:
    """The config.json of an export with one id that ends a text, all that a class may take (Higgs'); generation_config.json has all."""
    if isinstance(found := about.get("eos_token_id"), list) and found:
        write_json(out / "generation_config.json", {"eos_token_id": found})
        about = about | {"eos_token_id": found[0]}
    return {key: one_end(value, out) if isinstance(value, dict) else value for key, value in about.items()}


def same_pieces(source: Path, tokenizer: Path) -> bool:
    """Whether a base that has its tokenizer as vocab.json and merges.txt has the pieces of a tokenizer.json."""
    if (source / tokenizer.name).is_file() or not (source / "vocab.json").is_file() or tokenizer.suffix != ".json":
        return False
    found = read_json(tokenizer)
    return isinstance(found, dict) and (found.get("model") or {}).get("vocab") == read_json(source / "vocab.json")


def joined(base: Any, about: Any) -> Any:
    """An export's config with what its base's says besides."""
    kept = {key: value for key, value in base.items() if key not in about and key not in STALE or key in ITS_OWN}
    return about | kept | {key: joined(base[key], value) for key, value in about.items()
                           if isinstance(value, dict) and isinstance(base.get(key), dict) and key not in STALE}
