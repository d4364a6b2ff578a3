// The page of serve.py: talk, let it speak, chat, and look at a run. No build, no library.
import { fromPcm16, level, Player, Tape, toPcm16, wav } from "/web/sound.js";

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
const LOUD = 0.02, SPOKE = 0.3;                      // level that counts as speech; seconds of silence that end it
let about, context;

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  if (!response.ok) throw new Error((await response.text()).trim() || `${path}: ${response.status}`);
  return response;
}

async function ready() {
  context ??= new AudioContext(about.sample_rate ? { sampleRate: about.sample_rate } : {});
  await context.resume();
  return context;
}

// ---- options, with the ranges that the server names ----

function showOptions() {
  $("options").hidden = !about.options.length;
  for (const { name, low, high, value } of about.options) {
    const row = document.createElement("div"), label = document.createElement("label"), input = document.createElement("input"), now = document.createElement("output");
    row.className = "option";
    label.textContent = name.replaceAll("_", " ");
    label.htmlFor = input.id = `option-${name}`;
    Object.assign(input, { type: "range", min: low, max: high, step: name.includes("temperature") ? 0.05 : 1, value });
    now.textContent = value;
    input.oninput = () => { now.textContent = input.value; };
    row.append(label, input, now);
    $("option-list").append(row);
  }
}

function chosen() {
  return about.options.map(({ name, value }) => [name, $(`option-${name}`).value, value]).filter(([, now, usual]) => Number(now) !== usual);
}

// ---- talk ----

class Talk {
  async start() {
    const rate = about.sample_rate, persona = about.roles ? { text_prompt: $("role").value, voice_prompt: $("role-voice").value } : {};
    const query = new URLSearchParams({ format: "pcm16", ...Object.fromEntries(chosen()), ...persona, ...(token ? { token } : {}) });
    await ready();
    await context.audioWorklet.addModule("/web/recorder.js");
    if (this.stopped) return;                        // in the meantime
    this.player = new Player(context);
    this.tape = new Tape(rate);
    this.lastLoud = this.began = null;
    this.waitingFor = null;
    $("transcript").textContent = "";
    $("download").hidden = true;
    this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/chat?${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.message(new Uint8Array(data));
    this.socket.onclose = () => this.stop();
    $("state").textContent = "connecting …";
  }

  message(data) {
    const kind = data[0], body = data.subarray(1);
    if (kind === 0) this.listen().catch((error) => { problem(error.message); this.stop(); });
    else if (kind === 1) this.hear(fromPcm16(data.buffer, data.byteOffset + 1));
    else if (kind === 2) this.write(new TextDecoder().decode(body));
    else if (kind === 4) this.told(JSON.parse(new TextDecoder().decode(body)));
    else if (kind === 5) problem(new TextDecoder().decode(body));
  }

  told(news) {
    if (news.queue) $("state").textContent = `waiting, number ${news.queue} in the queue`;
    if (news.late_frames !== undefined) $("late").textContent = news.late_frames;
  }

  async listen() {
    const frame = Math.round(about.sample_rate * 0.02), name = $("source").value;
    if (name) {
      const file = await (await ask(`/users/${encodeURIComponent(name)}`)).arrayBuffer();
      this.source = context.createBufferSource();
      const samples = fromPcm16(file, 44);
      this.source.buffer = context.createBuffer(1, samples.length, about.sample_rate);
      this.source.buffer.copyToChannel(samples, 0);
      this.source.onended = () => this.stop();
      this.source.start();
    } else {
      const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: false, autoGainControl: true };
      this.stream = await navigator.mediaDevices.getUserMedia({ audio });
      this.source = context.createMediaStreamSource(this.stream);
    }
    this.recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0, processorOptions: { size: frame } });
    this.recorder.port.onmessage = ({ data }) => this.said(data.samples, data.at);
    this.source.connect(this.recorder);
    this.began = context.currentTime;
    $("state").textContent = "talking";
  }

  said(samples, at) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    const pcm = toPcm16(samples), message = new Uint8Array(1 + pcm.byteLength), now = at + samples.length / about.sample_rate, loud = level(samples);
    message[0] = 1;
    message.set(new Uint8Array(pcm.buffer), 1);
    this.socket.send(message);
    this.tape.add(1, at, samples);
    $("level-user").value = Math.min(1, 3 * loud);
    if (loud > LOUD) this.lastLoud = now;
    else if (this.lastLoud && now - this.lastLoud > 0.06) this.waitingFor = this.lastLoud;      // silence: a reply may come
    const seconds = Math.floor(now - this.began);
    $("clock").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }

  hear(samples) {
    const at = this.player.play(samples), loud = level(samples);
    this.tape.add(0, at, samples);
    $("level-agent").value = Math.min(1, 3 * loud);
    if (loud > LOUD && this.waitingFor) {
      const place = samples.findIndex((x) => Math.abs(x) > LOUD);
      const latency = at + place / about.sample_rate - this.waitingFor;
      $("latency").textContent = `${latency.toFixed(2)} s`;
      $("latency").dataset.seconds = latency;
      this.waitingFor = this.lastLoud = null;
    }
  }

  write(piece) {
    const span = document.createElement("span");
    span.textContent = piece;
    if (piece.trim().startsWith("(")) span.className = "heard";
    $("transcript").append(span);
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    this.socket?.close();
    this.source?.disconnect();
    this.stream?.getTracks().forEach((track) => track.stop());
    this.recorder?.disconnect();
    this.player?.stop();
    $("level-user").value = $("level-agent").value = 0;
    $("state").textContent = "not connected";
    $("talk").textContent = "Start talking";
    const blob = this.tape?.wav();
    if (blob) {
      $("download").href = URL.createObjectURL(blob);
      $("download").hidden = false;
    }
    talk = null;
  }
}

let talk = null;

function showTalk() {
  $("duplex").hidden = false;
  $("persona").hidden = !about.roles;
  for (const name of about.roles ? about.voices : []) $("role-voice").add(new Option(name));
  for (const name of about.users) $("source").add(new Option(`recorded: ${name}`, name));
  $("talk").onclick = async () => {
    problem("");
    if (talk) return talk.stop();
    talk = new Talk();
    $("talk").textContent = "Stop";
    try {
      await talk.start();
    } catch (error) {
      problem(error.message);
      $("talk").textContent = "Start talking";
      talk = null;
    }
  };
}

// ---- text to speech: sound plays with its first chunk ----

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1]);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function showSpeech() {
  $("speech").hidden = false;
  $("tab-live").textContent = "Speak";
  $("text").maxLength = about.text_characters;
  $("voice-label").hidden = !about.voices.length;
  for (const name of about.voices) $("voice").add(new Option(name));
  $("own-voice").hidden = !about.clones;
  $("speech").onsubmit = async (event) => {
    event.preventDefault();
    problem("");
    const button = $("speech").querySelector("button"), began = performance.now(), pieces = [];
    button.disabled = true;
    $("speech-state").textContent = "speaking …";
    try {
      await ready();
      const settings = Object.fromEntries(chosen().filter(([name]) => name === "audio_temperature").map(([, value]) => ["temperature", Number(value)]));
      const file = $("ref-audio").files[0], named = $("voice").value;
      const voice = file ? { ref_audio: await base64(file), ref_text: $("ref-text").value } : named ? { voice: named } : {};
      const body = { input: $("text").value, response_format: "pcm", ...settings, ...voice };
      const response = await ask("/v1/audio/speech", { method: "POST", body: JSON.stringify(body) }), player = new Player(context);
      let rest = new Uint8Array(0), first = 0;
      for (const reader = response.body.getReader(); ;) {
        const { done, value } = await reader.read();
        if (done) break;
        const bytes = new Uint8Array(rest.length + value.length);
        bytes.set(rest);
        bytes.set(value, rest.length);
        const whole = bytes.length & ~1, samples = fromPcm16(bytes.slice(0, whole).buffer);
        rest = bytes.slice(whole);
        if (!samples.length) continue;
        first ||= performance.now() - began;
        $("speech-state").textContent = `first sound after ${(first / 1000).toFixed(2)} s`;
        $("level-speech").value = Math.min(1, 3 * level(samples));
        player.play(samples);
        pieces.push(samples);
      }
      const whole = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
      pieces.reduce((at, piece) => (whole.set(piece, at), at + piece.length), 0);
      $("player").src = $("speech-download").href = URL.createObjectURL(wav([whole], about.sample_rate));
      $("player").hidden = $("speech-download").hidden = false;
    } catch (error) {
      problem(error.message);
      $("speech-state").textContent = "";
    } finally {
      button.disabled = false;
      $("level-speech").value = 0;
    }
  };
}

// ---- chat ----

function showChat() {
  const history = [];
  let cut = null, player = null;
  $("chat").hidden = false;
  $("aloud-label").hidden = !about.speaks;
  $("tab-live").textContent = "Chat";
  const bubble = (role, text) => {
    const p = document.createElement("p");
    p.className = role;
    p.textContent = text;
    $("messages").append(p);
    return p;
  };
  $("cut").onclick = () => { cut?.abort(); player?.stop(); };
  $("say").onsubmit = async (event) => {
    event.preventDefault();
    problem("");
    cut?.abort();                                    // who speaks while it answers cuts in
    player?.stop();
    const text = $("message").value, own = cut = new AbortController();
    $("message").value = "";
    bubble("user", text);
    history.push({ role: "user", content: text });
    const answer = bubble("assistant", ""), turn = { role: "assistant", content: "" };
    $("cut").hidden = false;
    try {
      const body = { messages: history, stream: true, ...($("aloud").checked ? { modalities: ["text", "audio"] } : {}) };
      if (body.modalities) player = new Player(await ready());
      const response = await ask("/v1/chat/completions", { method: "POST", signal: own.signal, body: JSON.stringify(body) });
      let rest = "";
      for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
        const { done, value } = await reader.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const line of events.filter((e) => e.startsWith("data: {"))) {
          const { content, audio } = JSON.parse(line.slice(6)).choices[0].delta;
          turn.content += content ?? "";
          if (audio?.data) player.play(fromPcm16(Uint8Array.from(atob(audio.data), (c) => c.charCodeAt(0)).buffer), 24000);
        }
        answer.textContent = turn.content || "(spoken)";
      }
    } catch (error) {
      if (error.name !== "AbortError") problem(error.message);
    }
    if (turn.content) history.push(turn);
    if (cut === own) $("cut").hidden = true;
  };
}

// ---- a run ----

function plot(points) {
  const svg = $("plot");
  svg.replaceChildren();
  if (!points?.length) return;
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y), span = (v) => [Math.min(...v), Math.max(...v) - Math.min(...v) || 1];
  const [x0, w] = span(xs), [y0, h] = span(ys), line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map(([x, y]) => `${(10 + 580 * (x - x0) / w).toFixed(1)},${(190 - 180 * (y - y0) / h).toFixed(1)}`).join(" "));
  svg.append(line);
  const [step, value] = points.at(-1);
  $("curve-now").textContent = `step ${step}: ${value.toPrecision(4)}; from ${Math.min(...ys).toPrecision(3)} to ${Math.max(...ys).toPrecision(3)}`;
}

let shown = "";

async function showRun() {
  const run = await (await ask("/run/index")).json(), names = Object.keys(run.curves).sort(), before = $("curve").value;
  $("run-name").textContent = `Samples of ${run.run}`;
  if (names.join() !== [...$("curve").options].map((o) => o.value).join()) {
    $("curve").replaceChildren(...names.map((name) => new Option(name)));
    $("curve").value = names.includes(before) ? before : names.includes("val/loss") ? "val/loss" : names[0] ?? "";
  }
  plot(run.curves[$("curve").value]);
  $("curve").onchange = () => plot(run.curves[$("curve").value]);
  const key = run.steps.map((step) => step.name + step.files.length).join();
  if (key === shown) return;                         // players that play are left alone
  shown = key;
  const files = [...new Set(run.steps.flatMap((step) => step.files.map((file) => file.name)))], table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const text of ["", ...run.steps.map((step) => step.name.replace("_", " "))]) head.append(Object.assign(document.createElement("th"), { textContent: text, scope: "col" }));
  for (const name of files) {
    const row = table.insertRow(), texts = run.steps.map((step) => step.files.find((file) => file.name === name)?.text).filter(Boolean);
    row.append(Object.assign(document.createElement("th"), { textContent: texts.at(-1)?.length < 200 ? texts.at(-1) : name, scope: "row" }));
    for (const step of run.steps) {
      const cell = row.insertCell();
      if (!step.files.some((file) => file.name === name)) continue;
      const query = token ? `?token=${encodeURIComponent(token)}` : "";
      cell.append(Object.assign(document.createElement("audio"), { controls: true, preload: "none", src: `/run/${step.name}/${encodeURIComponent(name)}${query}` }));
    }
  }
  $("steps").replaceChildren(table);
}

function view(name) {
  for (const other of ["live", "run"]) {
    $(`view-${other}`).hidden = other !== name;
    $(`tab-${other}`).setAttribute("aria-pressed", String(other === name));
  }
  if (name === "run") showRun().catch((error) => problem(error.message));
}

async function begin() {
  about = await (await ask("/about")).json();
  $("model").textContent = `${about.model}, ${about.slots} sessions at once`;
  showOptions();
  ({ duplex: showTalk, speech: showSpeech, chat: showChat })[about.kind]();
  $("tab-run").hidden = !about.run;
  $("tab-live").onclick = () => view("live");
  $("tab-run").onclick = () => view("run");
  if (about.run && location.hash === "#run") view("run");
  setInterval(() => { if (about.run && !$("view-run").hidden) showRun().catch((error) => problem(error.message)); }, 5000);
}

begin().catch((error) => problem(error.message));
