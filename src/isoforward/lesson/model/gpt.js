"use strict";
// The forward that both lives share, and its backward. Shapes are those of the Python model: T positions computed,
// S positions seen, C width, H heads, K key/value heads, D head width, F ffn width, V vocabulary.

class GPT {
  // `weights`: the Python model's own names -> Float32Array. A tied head is the embedding itself.
  constructor(config, weights) {
    this.config = config;
    this.weights = weights;
    this.llama = config.family === "llama";
    this.head = config.tied ? "embedding.weight" : "unembedding.weight";
    this.rotary = this.llama ? rotaryTable(config) : null;
  }

  layer(name, from = this.weights) {
    return { weight: from[`${name}.weight`], bias: from[`${name}.bias`] };
  }

  // Tokens (T) -> { hidden (T, C), kept }. With a cache they follow what it holds, which then holds them too.
  // `keep`: what backward will come back for, layer by layer. Serving lets go of it.
  trunk(tokens, cache = null, keep = false) {
    const { width: C, layers, context, norm_eps } = this.config,
      T = tokens.length,
      past = cache ? cache.length : 0;
    if (past + T > context) throw new RangeError(`${past + T} positions are more than the context of ${context}`);
    let x = new Float32Array(T * C);
    for (let t = 0; t < T; t++)
      for (let i = 0; i < C; i++) {
        x[t * C + i] = this.weights["embedding.weight"][tokens[t] * C + i];
        if (!this.llama) x[t * C + i] += this.weights["positions.weight"][(past + t) * C + i];
      }
    const kept = { tokens, blocks: [] };
    for (let n = 0; n < layers; n++) {
      const block = this.block(n, x, T, past, cache);
      if (keep) kept.blocks.push(block);
      x = block.out;
    }
    if (cache) cache.length += T;
    const final = norm(x, T, this.layer("norm"), norm_eps, !this.llama);
    if (keep) Object.assign(kept, { x, final, hidden: final.y });
    return { hidden: final.y, kept };
  }

  // One block on x (T, C): everything that it computed, of which `out` goes on.
  block(n, x, T, past, cache) {
    const c = this.config,
      C = c.width,
      KV = c.kv_heads * c.head_width,
      name = `blocks.${n}`;
    const made = { x };
    made.norm1 = norm(x, T, this.layer(`${name}.attention_norm`), c.norm_eps, !this.llama);
    const { weight, bias } = this.layer(`${name}.attention.qkv`);
    const qkv = linear(made.norm1.y, T, weight, bias, C + 2 * KV);
    [made.q, made.k, made.v] = columns(qkv, T, [C, KV, KV]);
    if (this.rotary) {
      rotate(made.q, T, c.head_width, this.rotary, past, false);
      rotate(made.k, T, c.head_width, this.rotary, past, false);
    }
    const [k, v] = cache ? cache.append(n, made.k, made.v) : [made.k, made.v];
    const shape = { T, past, heads: c.heads, kv_heads: c.kv_heads, D: c.head_width };
    Object.assign(made, { attended: attention(made.q, k, v, shape), shape });
    const out = this.layer(`${name}.attention.out`);
    made.middle = linear(made.attended.y, T, out.weight, out.bias, C);
    add(made.middle, x);
    made.norm2 = norm(made.middle, T, this.layer(`${name}.mlp_norm`), c.norm_eps, !this.llama);
    const up = this.layer(`${name}.mlp.${this.llama ? "gate_up" : "up"}`),
      down = this.layer(`${name}.mlp.down`);
    made.up = linear(made.norm2.y, T, up.weight, up.bias, (this.llama ? 2 : 1) * c.ffn_width);
    made.active = this.llama ? swiglu(made.up, T) : gelu(made.up);
    made.out = linear(made.active, T, down.weight, down.bias, C);
    add(made.out, made.middle);
    return made;
  }

  // hidden (T, C) -> logits (T, V)
  logits(hidden) {
    return linear(hidden, hidden.length / this.config.width, this.weights[this.head], null, this.config.vocab);
  }

  // The gradient of every weight, from that of the logits (T, V). `seen(stage, gradient)` hears of the stream's
  // gradient at each stage, from the head down to the embedding.
  backward(kept, dLogits, gradients, seen = () => {}) {
    const c = this.config,
      C = c.width,
      T = kept.tokens.length,
      at = (name) => this.layer(name, gradients);
    let d = linearBackward(dLogits, kept.hidden, T, this.weights[this.head], gradients[this.head], null);
    const last = at("norm");
    d = normBackward(d, kept.x, T, this.layer("norm"), kept.final, !this.llama, last.weight, last.bias);
    seen(c.layers, d);
    for (let n = c.layers - 1; n >= 0; n--) {
      d = this.blockBackward(n, d, kept.blocks[n], T, at);
      seen(n, d);
    }
    for (let t = 0; t < T; t++)
      for (let i = 0; i < C; i++) {
        gradients["embedding.weight"][kept.tokens[t] * C + i] += d[t * C + i];
        if (!this.llama) gradients["positions.weight"][t * C + i] += d[t * C + i];
      }
    return gradients;
  }

  blockBackward(n, d, made, T, at) {
    const name = `blocks.${n}`,
      centred = !this.llama,
      mlp = `${name}.mlp.${this.llama ? "gate_up" : "up"}`;
    const through = (layer, dy, x) => {
      const g = at(layer);
      return linearBackward(dy, x, T, this.layer(layer).weight, g.weight, g.bias);
    };
    const normed = (layer, dy, x, result) => {
      const g = at(layer);
      return normBackward(dy, x, T, this.layer(layer), result, centred, g.weight, g.bias);
    };
    let inner = through(`${name}.mlp.down`, d, made.active);
    inner = this.llama ? swigluBackward(inner, made.up, T) : geluBackward(inner, made.up);
    inner = through(mlp, inner, made.norm2.y);
    const middle = d.slice(); // the residual stream hands its gradient on as it is, and adds the branch's
    add(middle, normed(`${name}.mlp_norm`, inner, made.middle, made.norm2));
    const dy = through(`${name}.attention.out`, middle, made.attended.y);
    const { dq, dk, dv } = attentionBackward(dy, made.q, made.k, made.v, made.attended.weights, made.shape);
    if (this.rotary) {
      rotate(dq, T, made.shape.D, this.rotary, 0, true);
      rotate(dk, T, made.shape.D, this.rotary, 0, true);
    }
    inner = through(`${name}.attention.qkv`, joined([dq, dk, dv], T), made.norm1.y);
    add(middle, normed(`${name}.attention_norm`, inner, made.x, made.norm1));
    return middle;
  }
}

// (T, a + b + ...) -> (T, a), (T, b), ...
function columns(x, T, widths) {
  const whole = x.length / T;
  let start = 0;
  return widths.map((width) => {
    const part = new Float32Array(T * width);
    for (let t = 0; t < T; t++) part.set(x.subarray(t * whole + start, t * whole + start + width), t * width);
    start += width;
    return part;
  });
}

function joined(parts, T) {
  const widths = parts.map((part) => part.length / T),
    whole = widths.reduce((a, b) => a + b);
  const x = new Float32Array(T * whole);
  let start = 0;
  parts.forEach((part, n) => {
    for (let t = 0; t < T; t++) x.set(part.subarray(t * widths[n], (t + 1) * widths[n]), t * whole + start);
    start += widths[n];
  });
  return x;
}

// Keys and values of every layer, (capacity, K x D) each, of which `length` positions are held.
class KVCache {
  constructor({ layers, kv_heads, head_width }, capacity) {
    const room = () => Array.from({ length: layers }, () => new Float32Array(capacity * kv_heads * head_width));
    Object.assign(this, { keys: room(), values: room(), width: kv_heads * head_width, length: 0 });
  }

  append(layer, k, v) {
    const start = this.length * this.width,
      end = start + k.length;
    this.keys[layer].set(k, start);
    this.values[layer].set(v, start);
    return [this.keys[layer].subarray(0, end), this.values[layer].subarray(0, end)];
  }
}
