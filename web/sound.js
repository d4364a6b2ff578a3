// Sound in and out, in 16-bit samples: a queue that plays pieces one behind the other, and wav files.

export const level = (samples) => Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / Math.max(1, samples.length));

export function toPcm16(samples) {
  const out = new Int16Array(samples.length);
  for (let n = 0; n < samples.length; n++) out[n] = Math.max(-32768, Math.min(32767, Math.round(samples[n] * 32767)));
  return out;
}

export function fromPcm16(buffer, offset = 0) {
  const view = new DataView(buffer, offset), out = new Float32Array(view.byteLength >> 1);
  for (let n = 0; n < out.length; n++) out[n] = view.getInt16(2 * n, true) / 32768;
  return out;
}

// A wav of equally long channels.
export function wav(channels, rate) {
  const frames = channels[0].length, bytes = 2 * frames * channels.length, view = new DataView(new ArrayBuffer(44 + bytes));
  const text = (at, word) => [...word].forEach((c, n) => view.setUint8(at + n, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + bytes, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, channels.length, true); view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate * channels.length, true); view.setUint16(32, 2 * channels.length, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, bytes, true);
  const pcm = channels.map(toPcm16);
  for (let n = 0, at = 44; n < frames; n++) for (const channel of pcm) { view.setInt16(at, channel[n], true); at += 2; }
  return new Blob([view], { type: "audio/wav" });
}

// Plays pieces as they come; `play` gives the time at which a piece begins.
export class Player {
  constructor(context, ahead = 0.04) {
    this.context = context;
    this.ahead = ahead;
    this.next = 0;
    this.sources = new Set();
  }

  play(samples, rate = this.context.sampleRate) {
    const buffer = this.context.createBuffer(1, samples.length, rate), source = this.context.createBufferSource();
    buffer.copyToChannel(samples, 0);
    source.buffer = buffer;
    source.connect(this.context.destination);
    if (this.next < this.context.currentTime) this.next = this.context.currentTime + this.ahead;
    const at = this.next;
    source.start(at);
    this.sources.add(source);
    source.onended = () => this.sources.delete(source);
    this.next += buffer.duration;
    return at;
  }

  stop() {
    this.sources.forEach((source) => source.stop());
  }
}

// Pieces of several channels with their times -> one wav.
export class Tape {
  constructor(rate) {
    this.rate = rate;
    this.pieces = [[], []];
  }

  add(channel, at, samples) {
    this.pieces[channel].push([at, samples]);
  }

  wav() {
    const all = this.pieces.flat();
    if (!all.length) return null;
    const begin = Math.min(...all.map(([at]) => at)), place = (at) => Math.round((at - begin) * this.rate);
    const length = Math.max(...all.map(([at, samples]) => place(at) + samples.length));
    return wav(this.pieces.map((pieces) => {
      const channel = new Float32Array(length);
      pieces.forEach(([at, samples]) => channel.set(samples, place(at)));
      return channel;
    }), this.rate);
  }
}
