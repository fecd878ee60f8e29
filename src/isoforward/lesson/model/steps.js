"use strict";
// What training does and what serving does, side by side.
//
//   training    forward  loss  backward  optimizer    every position at once, all of it kept for backward
//   inference   forward                               every position of the prompt at once (prefill), then
//               forward                               one position at a time on what the cache kept (decode)

function forward(model, tokens) {
  const { hidden, kept } = model.trunk(tokens, null, true);
  return { logits: model.logits(hidden), kept };
}

// The mean cross-entropy of the next token over (T, V), in nats; each target's probability; the logits' gradient.
function lossOf(logits, targets) {
  const T = targets.length,
    V = logits.length / T,
    gradient = Float32Array.from(logits),
    probabilities = [];
  let loss = 0;
  targets.forEach((target, t) => {
    const row = softmax(gradient.subarray(t * V, (t + 1) * V));
    probabilities.push(row[target]);
    loss -= Math.log(Math.max(row[target], 1e-38)) / T;
    for (let i = 0; i < V; i++) row[i] /= T;
    row[target] -= 1 / T;
  });
  return { loss, probabilities, gradient };
}

function backward(model, kept, gradient, seen) {
  const gradients = {};
  for (const [name, weight] of Object.entries(model.weights)) gradients[name] = new Float32Array(weight.length);
  return model.backward(kept, gradient, gradients, seen);
}

// AdamW (Loshchilov 2019) with the gradient's norm cut to 1; as in train.py only the blocks' matrices decay.
class AdamW {
  constructor(weights, matrices, { lr = 1e-3, decay = 0.1, betas = [0.9, 0.95], clip = 1 } = {}) {
    Object.assign(this, { weights, matrices: new Set(matrices), lr, decay, betas, clip, steps: 0, state: {} });
    for (const [name, { length }] of Object.entries(weights))
      this.state[name] = { mean: new Float32Array(length), square: new Float32Array(length) };
  }

  step(gradients) {
    const [b1, b2] = this.betas,
      total = Math.hypot(...Object.values(gradients).map(size));
    const cut = Math.min(1, this.clip / (total + 1e-6));
    this.steps++;
    const first = 1 - b1 ** this.steps,
      second = Math.sqrt(1 - b2 ** this.steps);
    for (const [name, w] of Object.entries(this.weights)) {
      const g = gradients[name],
        { mean, square } = this.state[name];
      const shrink = this.matrices.has(name) ? 1 - this.lr * this.decay : 1;
      for (let i = 0; i < w.length; i++) {
        const d = g[i] * cut;
        mean[i] += (1 - b1) * (d - mean[i]);
        square[i] = b2 * square[i] + (1 - b2) * d * d;
        w[i] = w[i] * shrink - ((this.lr / first) * mean[i]) / (Math.sqrt(square[i]) / second + 1e-8);
      }
    }
    return total;
  }
}

// The whole of a training step, as it is in steps.py.
function trainStep(model, optimizer, tokens, targets) {
  const { logits, kept } = forward(model, tokens);
  const { loss, gradient } = lossOf(logits, targets);
  const gradients = backward(model, kept, gradient);
  optimizer.step(gradients);
  return loss;
}

// Serving needs the logits of the last position alone.
function lastLogits(model, tokens, cache) {
  const { hidden } = model.trunk(tokens, cache);
  return model.logits(hidden.subarray(hidden.length - model.config.width));
}

// Greedy generation, a forward pass at a time: `next()` gives what the pass computed, read, cost, and chose.
class Generation {
  constructor(model, prompt, { cached, capacity }) {
    this.model = model;
    this.tokens = [...prompt];
    this.cache = cached ? new KVCache(model.config, capacity) : null;
  }

  next() {
    const past = this.cache ? this.cache.length : 0,
      fed = this.tokens.slice(past),
      start = performance.now();
    const logits = lastLogits(this.model, fed, this.cache),
      token = argmax(logits);
    const time_ms = performance.now() - start;
    this.tokens.push(token);
    return { token, logits, time_ms, computed: fed.length, past, ...costOf(this.model, fed.length, past, this.cache) };
  }
}

// FLOPs of the matrix products of one serving forward (the convention "model"), and the bytes that it must move at
// least: each weight once, the looked-up rows, the cached keys and values read and the new ones written.
function costOf({ config: c, weights, head, llama }, T, past, cache) {
  const KV = c.kv_heads * c.head_width,
    S = past + T;
  const block = c.width * (c.width + 2 * KV) + c.width * c.width + (llama ? 3 : 2) * c.width * c.ffn_width;
  const flops = c.layers * (2 * T * block + 4 * T * S * c.width) + 2 * c.width * c.vocab;
  let numbers = (llama ? 1 : 2) * T * c.width; // rows of the tables that are looked up
  for (const [name, { length }] of Object.entries(weights))
    if (name === head || !/^(embedding|positions)/.test(name)) numbers += length;
  if (cache) numbers += 2 * c.layers * S * KV;
  return { flops, bytes: 4 * numbers };
}

// Teacher forcing: training's one forward has at every position what generation computes one by one.
function oneByOne(model, tokens) {
  const cache = new KVCache(model.config, tokens.length),
    V = model.config.vocab;
  const logits = new Float32Array(tokens.length * V);
  tokens.forEach((token, t) => logits.set(lastLogits(model, [token], cache), t * V));
  return logits;
}
