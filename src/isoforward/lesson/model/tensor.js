"use strict";
// Arithmetic on flat Float32Arrays, row-major. Every function that has a gradient is followed by it.
// A sum runs in the same order whatever the number of rows T is, so that a cached forward gives the bits of a full one.

// x (T, n), weight (m, n), bias (m) or null -> (T, m): each output the sum of n products.
// Two rows and four outputs at a time share what they read; at an edge some of the eight sums are the same.
function linear(x, T, weight, bias, m) {
  const n = x.length / T,
    y = new Float32Array(T * m);
  for (let t = 0; t < T; t += 2) {
    const pair = t + 1 < T,
      x0 = t * n,
      x1 = x0 + n;
    for (let j = 0; j < m; j += 4) {
      const w0 = j * n,
        w1 = Math.min(j + 1, m - 1) * n,
        w2 = Math.min(j + 2, m - 1) * n,
        w3 = Math.min(j + 3, m - 1) * n;
      let a = 0,
        b = 0,
        c = 0,
        d = 0,
        e = 0,
        f = 0,
        g = 0,
        h = 0;
      if (pair)
        for (let i = 0; i < n; i++) {
          const u = x[x0 + i],
            v = x[x1 + i],
            p = weight[w0 + i],
            q = weight[w1 + i],
            r = weight[w2 + i],
            s = weight[w3 + i];
          a += u * p;
          b += u * q;
          c += u * r;
          d += u * s;
          e += v * p;
          f += v * q;
          g += v * r;
          h += v * s;
        }
      else
        for (let i = 0; i < n; i++) {
          const u = x[x0 + i];
          a += u * weight[w0 + i];
          b += u * weight[w1 + i];
          c += u * weight[w2 + i];
          d += u * weight[w3 + i];
        }
      const first = t * m + j,
        second = first + m;
      y[first] = a;
      if (j + 1 < m) y[first + 1] = b;
      if (j + 2 < m) y[first + 2] = c;
      if (j + 3 < m) y[first + 3] = d;
      if (!pair) continue;
      y[second] = e;
      if (j + 1 < m) y[second + 1] = f;
      if (j + 2 < m) y[second + 2] = g;
      if (j + 3 < m) y[second + 3] = h;
    }
  }
  if (bias) for (let t = 0; t < T; t++) for (let j = 0; j < m; j++) y[t * m + j] += bias[j];
  return y;
}

// Two products for the forward's one: dx = dy W, to be handed on; dW += dy' x, to learn from (and db += sum of dy).
function linearBackward(dy, x, T, weight, dWeight, dBias) {
  const n = x.length / T,
    m = dy.length / T;
  const dx = linear(dy, T, transposed(weight, m), null, n);
  add(dWeight, linear(transposed(dy, T), m, transposed(x, T), null, n));
  if (dBias) for (let t = 0; t < T; t++) for (let j = 0; j < m; j++) dBias[j] += dy[t * m + j];
  return dx;
}

function transposed(x, rows) {
  const columns = x.length / rows,
    y = new Float32Array(x.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) y[j * rows + i] = x[i * columns + j];
  return y;
}

// LayerNorm, or RMSNorm (`centred` false): every row scaled to a variance (a mean square) of 1.
function norm(x, T, { weight, bias }, eps, centred) {
  const n = x.length / T,
    y = new Float32Array(x.length),
    mean = new Float64Array(T),
    scale = new Float64Array(T);
  for (let t = 0; t < T; t++) {
    const at = t * n;
    let sum = 0,
      squares = 0;
    if (centred) for (let i = 0; i < n; i++) sum += x[at + i];
    mean[t] = sum / n;
    for (let i = 0; i < n; i++) squares += (x[at + i] - mean[t]) ** 2;
    scale[t] = 1 / Math.sqrt(squares / n + eps);
    for (let i = 0; i < n; i++) y[at + i] = (x[at + i] - mean[t]) * scale[t] * weight[i] + (bias ? bias[i] : 0);
  }
  return { y, mean, scale };
}

function normBackward(dy, x, T, { weight, bias }, { mean, scale }, centred, dWeight, dBias) {
  const n = x.length / T,
    dx = new Float32Array(x.length);
  for (let t = 0; t < T; t++) {
    const at = t * n;
    let sum = 0,
      along = 0; // of the gradient behind the weight, and along the normalised x
    for (let i = 0; i < n; i++) {
      const unit = (x[at + i] - mean[t]) * scale[t],
        g = dy[at + i] * weight[i];
      sum += g;
      along += g * unit;
      dWeight[i] += dy[at + i] * unit;
      if (bias) dBias[i] += dy[at + i];
    }
    const level = centred ? sum / n : 0;
    for (let i = 0; i < n; i++) {
      const unit = (x[at + i] - mean[t]) * scale[t];
      dx[at + i] = (dy[at + i] * weight[i] - level - (unit * along) / n) * scale[t];
    }
  }
  return dx;
}

// GELU by its tanh approximation, as GPT-2 has it.
const ROOT = Math.sqrt(2 / Math.PI),
  CUBE = 0.044715;

function gelu(x) {
  return x.map((v) => 0.5 * v * (1 + Math.tanh(ROOT * (v + CUBE * v * v * v))));
}

function geluBackward(dy, x) {
  return x.map((v, i) => {
    const tanh = Math.tanh(ROOT * (v + CUBE * v * v * v));
    return dy[i] * (0.5 * (1 + tanh) + 0.5 * v * (1 - tanh * tanh) * ROOT * (1 + 3 * CUBE * v * v));
  });
}

// SwiGLU: of (T, 2F), the first half gates the second -> (T, F).
function swiglu(x, T) {
  const F = x.length / T / 2,
    y = new Float32Array(T * F);
  for (let t = 0; t < T; t++)
    for (let i = 0; i < F; i++) {
      const gate = x[t * 2 * F + i];
      y[t * F + i] = (gate / (1 + Math.exp(-gate))) * x[t * 2 * F + F + i];
    }
  return y;
}

function swigluBackward(dy, x, T) {
  const F = x.length / T / 2,
    dx = new Float32Array(x.length);
  for (let t = 0; t < T; t++)
    for (let i = 0; i < F; i++) {
      const at = t * 2 * F + i,
        gate = x[at],
        up = x[at + F],
        sigmoid = 1 / (1 + Math.exp(-gate)),
        d = dy[t * F + i];
      dx[at] = d * up * sigmoid * (1 + gate * (1 - sigmoid));
      dx[at + F] = d * gate * sigmoid;
    }
  return dx;
}

// Rotary positions turn feature i with i + D/2 of every head, in place; `back` turns the other way: the gradient.
function rotate(x, T, D, table, first, back) {
  const width = x.length / T,
    half = D / 2,
    sign = back ? -1 : 1;
  for (let t = 0; t < T; t++)
    for (let head = 0; head < width; head += D)
      for (let i = 0; i < half; i++) {
        const a = t * width + head + i,
          b = a + half,
          [one, two] = [x[a], x[b]];
        const cosine = table.cosine[(first + t) * half + i],
          sine = sign * table.sine[(first + t) * half + i];
        x[a] = one * cosine - two * sine;
        x[b] = two * cosine + one * sine;
      }
}

function rotaryTable({ head_width, context, rope_theta, rope_scaling }) {
  const half = head_width / 2,
    cosine = new Float32Array(context * half),
    sine = new Float32Array(context * half);
  for (let i = 0; i < half; i++) {
    let frequency = Math.fround(1 / Math.fround(rope_theta ** Math.fround((2 * i) / head_width)));
    if (rope_scaling) {
      // Llama 3.1: slow frequencies are divided, fast ones kept, those between blended
      const { factor, low_freq_factor: low, high_freq_factor: high, original_context: original } = rope_scaling;
      const turns = (original * frequency) / (2 * Math.PI);
      const blend = Math.min(1, Math.max(0, (turns - low) / (high - low)));
      frequency = Math.fround(((1 - blend) * frequency) / factor + blend * frequency);
    }
    for (let t = 0; t < context; t++) {
      const angle = Math.fround(t * frequency);
      cosine[t * half + i] = Math.cos(angle);
      sine[t * half + i] = Math.sin(angle);
    }
  }
  return { cosine, sine };
}

// Causal attention: q (T, H x D) of positions `past`... on k, v (S, K x D) -> y (T, H x D) and the weights (H, T, S).
function attention(q, k, v, { T, past, heads, kv_heads, D }) {
  const S = past + T,
    C = heads * D,
    KV = kv_heads * D,
    shared = heads / kv_heads,
    scale = 1 / Math.sqrt(D);
  const y = new Float32Array(T * C),
    weights = new Float32Array(heads * T * S);
  for (let h = 0; h < heads; h++)
    for (let t = 0; t < T; t++) {
      const row = weights.subarray((h * T + t) * S, (h * T + t + 1) * S),
        sees = past + t + 1;
      const own = t * C + h * D,
        theirs = Math.floor(h / shared) * D;
      for (let s = 0; s < sees; s++) {
        let dot = 0;
        for (let i = 0; i < D; i++) dot += q[own + i] * k[s * KV + theirs + i];
        row[s] = dot * scale;
      }
      softmax(row, sees);
      for (let s = 0; s < sees; s++) for (let i = 0; i < D; i++) y[own + i] += row[s] * v[s * KV + theirs + i];
    }
  return { y, weights };
}

function attentionBackward(dy, q, k, v, weights, { T, heads, kv_heads, D }) {
  const C = heads * D,
    KV = kv_heads * D,
    shared = heads / kv_heads,
    scale = 1 / Math.sqrt(D);
  const dq = new Float32Array(T * C),
    dk = new Float32Array(T * KV),
    dv = new Float32Array(T * KV);
  const dWeight = new Float64Array(T);
  for (let h = 0; h < heads; h++)
    for (let t = 0; t < T; t++) {
      const row = weights.subarray((h * T + t) * T, (h * T + t + 1) * T);
      const own = t * C + h * D,
        theirs = Math.floor(h / shared) * D;
      let mean = 0;
      for (let s = 0; s <= t; s++) {
        let dot = 0;
        for (let i = 0; i < D; i++) {
          dot += dy[own + i] * v[s * KV + theirs + i];
          dv[s * KV + theirs + i] += row[s] * dy[own + i];
        }
        dWeight[s] = dot;
        mean += dot * row[s];
      }
      for (let s = 0; s <= t; s++) {
        const score = row[s] * (dWeight[s] - mean) * scale;
        for (let i = 0; i < D; i++) {
          dq[own + i] += score * k[s * KV + theirs + i];
          dk[s * KV + theirs + i] += score * q[own + i];
        }
      }
    }
  return { dq, dk, dv };
}

// In place, over the first `n`.
function softmax(x, n = x.length) {
  let largest = -Infinity,
    sum = 0;
  for (let i = 0; i < n; i++) if (x[i] > largest) largest = x[i];
  for (let i = 0; i < n; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < n; i++) x[i] /= sum;
  return x;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

function size(x) {
  // the Euclidean norm
  let squares = 0;
  for (let i = 0; i < x.length; i++) squares += x[i] * x[i];
  return Math.sqrt(squares);
}

function argmax(x) {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}
