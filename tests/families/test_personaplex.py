"""PersonaPlex: what NVIDIA's generator makes of a voice, a role and a user, ours makes too; its prompts are trained on and sampled alike;
the smoke twin runs from training to the official files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, call, killed_and_resumed
from test_parity import Golden, check, same_tensors
from test_sample import overfit, roomy
from torch import Tensor

from audio.wav import load_wav
from checkpoint import export, load
from corpus.bundled import demo_dialogues
from corpus.examples import build_example
from corpus.index import prepare
from families import personaplex
from families.family import family_of, lay_out
from families.formats import config_differences
from families.moshi import FORMAT, PERSONAPLEX_7B
from generation.decode_step import SampleConfig
from generation.dialogue import Persona, UserFeed, behind, make_persona, user_rows
from generation.sessions import SessionBatch
from loss import LossConfig, loss_scale
from model import MultistreamLM
from options import run_config
from sample import generate, reply
from streams import Example, delay
from text.tokenizers import load_tokenizer

GREEDY = SampleConfig(temperature=0)
CASES = ["personaplex", "personaplex_late"]


@pytest.fixture
def small(request, tmp_path, monkeypatch) -> tuple[Golden, MultistreamLM]:
    """A golden case and its model; silence and sine are of so few codebooks."""
    case = Golden(request.param)
    for name in ("silence", "sine"):
        monkeypatch.setattr(personaplex, name.upper(), tuple(case[name].tolist()))
    return case, load(case.write(tmp_path))


def persona_of(case: Golden, model: MultistreamLM) -> Persona:
    return Persona(personaplex.persona(case["role"], case["voice"], model.table))


@pytest.mark.parametrize("small", CASES, indirect=True)
@torch.inference_mode()
def test_logits_and_frames_behind_a_voice_and_a_role_equal_the_official_generator(small, tmp_path):
    case, model = small
    table, lag = model.table, max(model.table.delays)
    assert table.layout == "personaplex"
    text, audio = model(delay(case["codes"], table.delays, table.column("start")))
    check(case.name, text, case["text_logits"])
    for k, row in enumerate(table.audio_out):
        mask = case["mask"][:, k]
        check(case.name, audio[:, k].roll(-table.delays[row], 1)[mask], case["logits"][:, k][mask])
    torch.save({"embeddings": case["embeddings"], "cache": case["cache"]}, tmp_path / "voice.pt")
    codes, inputs = personaplex.stored_voice(tmp_path / "voice.pt", table)
    recorded = persona_of(case, model)
    stored = Persona(personaplex.persona(case["role"], codes, table), inputs)
    for persona in (recorded, stored):                              # as moshi's, it never reads the first frame
        frames = reply(model, case["user"], GREEDY, skip_first_frame=True, persona=persona)
        assert torch.equal(frames[0, :, : 12 - lag], case["frames"][0, :, lag:])
    assert not torch.equal(reply(model, case["user"], GREEDY, persona=recorded)[0, :, : 12 - lag], case["frames"][0, :, lag:])


@pytest.mark.parametrize("small", CASES, indirect=True)
def test_a_live_session_behind_a_persona_is_the_reply_to_a_file(small):
    """What is heard replaces what was drawn; the late codes of the prompt stand in the first columns."""
    case, model = small
    table, persona = model.table, persona_of(case, model)
    wanted = reply(model, case["user"], replace(GREEDY, seed=3, temperature=0.8), persona=persona)[0]
    (prompt, given), before = behind(persona.frames, table), persona.frames[user_rows(table)]
    batch = SessionBatch(model, 3, columns=96)
    first = batch.begin(1, prompt, replace(GREEDY, temperature=0.8), 3, before=before, given=given, alone=batch.read_prompt(prompt))
    frames = [first] + [batch.step({1: codes}).get(1) for codes in case["user"][0].unbind(-1)]
    said, lag = torch.stack([f for f in frames if f is not None], -1), max(table.delays)
    at = said.shape[1] - (12 - lag) - 1                              # frames of the prompt that its late codes complete
    assert torch.equal(said[: -len(before), at : at + 12 - lag], wanted[: -len(before), : 12 - lag])


@pytest.mark.parametrize("small", CASES[:1], indirect=True)
def test_what_is_heard_overrides_what_is_drawn(small):
    case, model = small
    frames = reply(model, case["user"], SampleConfig(temperature=0.9, seed=1))
    assert torch.equal(frames[:, user_rows(model.table)], case["user"]) and (frames >= 0).all()
    grid = delay(frames, model.table.delays, model.table.column("start"))
    feed = UserFeed(case["user"], model.table)
    greedy = torch.stack(list(generate(model, model.table.column("start"), replace(GREEDY, max_frames=13), feed)), -1)[..., :12]
    assert torch.equal(greedy[:, user_rows(model.table)], case["user"]) and grid.shape[-1] == 13
    with torch.inference_mode():
        text, audio = model(delay(greedy, model.table.delays, model.table.column("start")))
    assert torch.equal(text.argmax(-1)[0], greedy[0, 0])
    for k, row in enumerate(model.table.audio_out[:3]):
        late = model.table.delays[row]
        assert torch.equal(audio[0, k].argmax(-1)[late:], greedy[0, row, : 12 - late])


# ---- files ----

def test_published_size_and_a_config_that_names_the_model_alone(tmp_path):
    """2 bytes each, 16,742,874,000 of the released file are these and its header."""
    with torch.device("meta"):
        model = MultistreamLM(PERSONAPLEX_7B)
    count = model.count_parameters()
    assert count == 8_371_408_896 and 0 < 16_742_874_000 - 2 * count < 60_000
    sparse = {"model_type": "personaplex", "version": "7b-v1"}
    assert FORMAT.recognise(sparse)
    about = FORMAT.complete(dict(sparse), {}, "x", None)
    config = FORMAT.read(about, {})
    assert config.table.layout == "personaplex" and not config_differences(config, PERSONAPLEX_7B)


@pytest.mark.parametrize("small", CASES, indirect=True)
def test_official_files_are_written_back(small, tmp_path):
    case, model = small
    folder = export(model, tmp_path / "back", to="moshi")
    again = load(folder)
    assert same_tensors(again, model) and again.table == model.table
    assert json.loads((folder / "config.json").read_text())["model_type"] == "personaplex"


@pytest.mark.parametrize(("found", "words"), [({"embeddings": torch.zeros(3, 1, 1, 24)}, "no voice of this model"),
                                              (b"x", "cannot be read")])
def test_a_file_that_is_no_voice_is_named(found, words, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(found, path) if isinstance(found, dict) else path.write_bytes(found)
    with pytest.raises(ValueError, match=words):
        personaplex.stored_voice(path, PERSONAPLEX_7B.table)


def test_a_role_is_written_in_its_marks_once():
    assert personaplex.role("  Be kind. ") == "<system> Be kind. <system>" == personaplex.role("<system> Be kind. <system>")
    tokenizer = load_tokenizer("bytes")
    made = make_persona("Be kind.", (), None, tokenizer, PERSONAPLEX_7B.table).frames
    ids = tokenizer.encode("<system> Be kind. <system>")
    assert made[0].tolist() == [3] * 6 + ids + [3] * 6
    assert made[1:9, 0].tolist() == [948, 243, 1178, 546, 1736, 1030, 1978, 2008] and made[9:, -1].tolist() == list(personaplex.SINE)
    with pytest.raises(ValueError, match="takes no role and no voice"):
        make_persona("Be kind.", (), None, tokenizer, replace(PERSONAPLEX_7B.table, layout="duplex"))


# ---- training ----

@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    """Dialogues with a role and a voice of their own, with the usual ones, and the smoke twin's config for them."""
    folder = tmp_path_factory.mktemp("roles")
    source = Path(demo_dialogues(folder / "d", 3))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    wav, rate = load_wav(source.parent / "002.wav", 16_000, 2)
    soundfile.write(source.parent / "voice.wav", wav[0, : rate].numpy(), rate)
    rows[0] |= {"text_prompt": "please hold", "voice_prompt": "voice.wav"}
    rows[1] |= {"voice_prompt": "nobody.wav"}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    smoke = run_config(ROOT / "configs/personaplex.py", "smoke")
    data = replace(smoke.data, sources=(str(source),), cache=str(folder / "c"), tokenizer=str(source.parent / "words.json"), held_out=0.0)
    return replace(smoke, data=data)


def prompt_length(tokens: Tensor) -> int:
    return int((tokens[9, 1:] == personaplex.SINE[0]).long().cumprod(0).sum())


def test_roles_and_voices_stand_in_front_and_are_never_trained(roles, capsys):
    table = roles.model.table
    index = prepare(roles.data, table)
    told = capsys.readouterr().err
    assert "its reference was left out" in told or "missing file" in told, told
    tokenizer, drawn = load_tokenizer(roles.data.tokenizer), {}
    for n, entry in enumerate(index.entries):
        if entry.chunk and entry.chunk[0] == 0:
            drawn[entry.id.split("@")[0]] = entry, *lay_out(build_example(index, n, table), table), build_example(index, n, table, None, n)
    assert drawn.keys() == {"000", "002"}
    entry, tokens, weights, _ = drawn["000"]
    role = tokenizer.encode("<system> please hold <system>")
    voice = index.codes(entry.reference, 0)
    P = voice.shape[1] + 6 + len(role) + 6
    assert voice.shape[0] == 8 and voice.shape[1] == 25 and prompt_length(tokens) == P                  # a second, at 25 frames
    assert tokens[0, 1 : 1 + P].tolist() == [3] * (P - len(role) - 6) + role + [3] * 6
    assert torch.equal(tokens[1, 1 : 1 + voice.shape[1]], voice[0]) and torch.equal(tokens[2, 2 : 2 + voice.shape[1]], voice[1])
    assert not weights[:, : 1 + P].any() and not weights[2, 1 + P] and weights[0, 1 + P :].all()
    assert weights[9, 1 + P :].all() and weights[10, 2 + P :].all()                                     # both speakers are trained
    entry, tokens, weights, other = drawn["002"]
    assert prompt_length(tokens) == 12 + len(tokenizer.encode("<system> thank you <system>"))           # the usual role, no voice
    assert other.prompt.shape[1] > prompt_length(tokens)                                                # a chunk that is somebody's voice


def test_the_prompt_of_sampling_is_that_of_training(roles, tmp_path):
    table, index = roles.model.table, prepare(roles.data, roles.model.table)
    number = next(n for n, e in enumerate(index.entries) if e.id.startswith("002@"))
    grid, _ = lay_out(build_example(index, number, table), table)
    persona = make_persona(roles.data.system, (), None, load_tokenizer(roles.data.tokenizer), table)
    prompt, given = behind(persona.frames, table)
    S = prompt.shape[1]
    assert torch.equal(grid[:, :S], prompt) and torch.equal(grid[:, S][given[:, 0] >= 0], given[:, 0][given[:, 0] >= 0])


def test_an_overfitted_exchange_comes_back_behind_its_persona(roles):
    """What the agent says and writes while it hears the user, greedily; the late codes of the prompt are heard, too."""
    table, draw = roles.model.table, torch.Generator().manual_seed(1)
    codes, user = torch.randint(0, 256, (2, 8, 9), generator=draw)
    text = torch.randint(4, 8, (9,), generator=draw)
    persona = make_persona("please hold", (), None, load_tokenizer(roles.data.tokenizer), table)
    model = overfit(roomy(roles.model), Example(text, codes, user=user, prompt=persona.frames), 400)
    got = reply(model, user[None], GREEDY, persona=persona)[0]
    assert torch.equal(got[1:9, :8], codes[:, :8]) and torch.equal(got[0, :8], text[:8])


def test_the_presets_weigh_as_they_say(roles):
    """Padding in full, the text twentyfold, nothing on the user."""
    community = run_config(ROOT / "configs/personaplex.py", "community")
    assert community.data.text_padding_weight == 1.0 and community.loss.text == 20 and set(community.data.stream_weights[9:]) == {0.0}
    assert run_config(ROOT / "configs/personaplex.py", "full").lora is None
    table, weight = PERSONAPLEX_7B.table, torch.tensor([50.0, *community.data.stream_weights[1:]]) * 1.0
    scale = loss_scale(weight, table, LossConfig(text=20.0)) * weight
    assert float(scale[0]) == pytest.approx(20) and float(scale[1:].sum()) == pytest.approx(1)


@pytest.mark.slow
def test_smoke_trains_resumes_answers_exports_and_reads_back(tmp_path):
    out = tmp_path / "run"
    killed_and_resumed("personaplex", out, f"--data.cache={tmp_path}/cache", "--eval_every=0", "--prompts=()")
    user = ROOT / "out/cache/roles/001.wav"
    code, text, err = call("sample.py", f"--ckpt={out}", f"--user={user}", f"--ref={user}", f"--out={tmp_path}/x.wav",
                           "--system=please hold")
    assert code == 0, err
    assert abs(soundfile.info(tmp_path / "x.wav").duration - soundfile.info(user).duration) < 0.1
    again = load(export(load(out), tmp_path / "official", "moshi"))
    assert again.table.layout == "personaplex" and family_of(again.table).name == "PersonaPlex"
