"use strict";
// What page.py packed: base64 of deflated bytes. 16 bits are IEEE halves, high bytes first and low bytes after, which
// deflate better apart; 8 bits are integers with a float32 scale a row. Vectors stay in 32 bits.

async function unpacked({ tensors, data }) {
  const bytes = await inflated(data),
    weights = {};
  let at = 0;
  const take = (n) => bytes.slice(at, (at += n));
  for (const { name, shape, bits } of tensors) {
    const n = shape.reduce((a, b) => a * b);
    if (bits === 32) weights[name] = new Float32Array(take(4 * n).buffer);
    else if (bits === 16) weights[name] = fromHalves(take(n), take(n));
    else weights[name] = fromIntegers(new Int8Array(take(n).buffer), new Float32Array(take(4 * shape[0]).buffer));
  }
  return weights;
}

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromHalves(high, low) {
  const values = new Float32Array(high.length);
  for (let i = 0; i < values.length; i++) {
    const sign = high[i] & 0x80 ? -1 : 1,
      exponent = (high[i] >> 2) & 31,
      fraction = ((high[i] & 3) << 8) | low[i];
    values[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24);
  }
  return values;
}

function fromIntegers(integers, scales) {
  const n = integers.length / scales.length,
    values = new Float32Array(integers.length);
  for (let i = 0; i < values.length; i++) values[i] = integers[i] * scales[Math.floor(i / n)];
  return values;
}
