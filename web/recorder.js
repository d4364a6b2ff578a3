// An AudioWorklet: what comes in, in frames of `size` samples, each with the context's time of its first one.
class Recorder extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.frame = new Float32Array(options.processorOptions.size);
    this.filled = 0;
  }

  process(inputs) {
    const input = inputs[0][0] ?? new Float32Array(128);      // silence where nothing is connected any more
    for (let at = 0; at < input.length;) {
      const n = Math.min(input.length - at, this.frame.length - this.filled);
      this.frame.set(input.subarray(at, at + n), this.filled);
      this.filled += n;
      at += n;
      if (this.filled === this.frame.length) {
        this.port.postMessage({ samples: this.frame.slice(), at: (currentFrame + at - this.frame.length) / sampleRate });
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
