// Runs the page's arithmetic under Node: a page on the command line, a request in JSON on stdin, answers in JSON.
import { readFileSync } from "node:fs";
import vm from "node:vm";

const html = readFileSync(process.argv[2], "utf-8");
const data = JSON.parse(html.match(/<script type="application\/json" id="data">(.*?)<\/script>/s)[1]);
const script = html.match(/<script>(.*)<\/script>/s)[1];
const context = vm.createContext({ console, performance, TextEncoder, TextDecoder, atob, Blob, Response, DecompressionStream, Uint8Array, Float32Array, Float64Array, Int8Array, ArrayBuffer });
const names = ["GPT", "Tokenizer", "unpacked", "forward", "lossOf", "backward", "AdamW", "Generation", "oneByOne", "costOf", "trainStep"];
vm.runInContext(`${script}\nObject.assign(globalThis, { ${names.join(", ")} });`, context);
const { GPT, Tokenizer, unpacked, forward, lossOf, backward, AdamW, Generation, oneByOne, trainStep } = context;

const weights = await unpacked(data.model.weights);
const model = new GPT(data.model.config, weights), tokenizer = new Tokenizer(data.tokenizer);
const asked = JSON.parse(readFileSync(0, "utf-8")), list = (x) => Array.from(x);
const answer = {};
if (asked.texts) {
  answer.encoded = asked.texts.map((text) => { try { return tokenizer.encode(text); } catch { return null; } });
  answer.decoded = answer.encoded.map((ids) => ids && tokenizer.decode(ids));
}
if (asked.tokens) {
  const tokens = asked.tokens.slice(0, -1), targets = asked.tokens.slice(1);
  const { logits, kept } = forward(model, tokens), { loss, gradient } = lossOf(logits, targets);
  answer.logits = list(logits);
  answer.loss = loss;
  answer.gradients = Object.fromEntries(Object.entries(backward(model, kept, gradient)).map(([name, g]) => [name, list(g)]));
  const one = oneByOne(model, tokens);
  answer.apart = logits.reduce((most, x, i) => Math.max(most, Math.abs(x - one[i])), 0);
}
if (asked.prompt) {
  const capacity = asked.prompt.length + asked.count;
  for (const cached of [true, false]) {
    const run = new Generation(model, asked.prompt, { cached, capacity }), passes = [];
    for (let i = 0; i < asked.count; i++) passes.push(run.next());
    answer[cached ? "cached" : "uncached"] = {
      tokens: run.tokens,
      logits: list(passes.at(-1).logits),
      passes: passes.map(({ computed, past, flops, bytes, time_ms }) => ({ computed, past, flops, bytes, time_ms })),
    };
  }
}
if (asked.steps) {
  const optimizer = new AdamW(weights, data.model.weights.tensors.filter((each) => each.name.startsWith("blocks.") && each.shape.length === 2).map((each) => each.name), asked.adamw);
  const tokens = asked.tokens.slice(0, -1), targets = asked.tokens.slice(1);
  answer.losses = [];
  answer.times_ms = [];
  for (let i = 0; i < asked.steps; i++) {
    const start = performance.now();
    answer.losses.push(trainStep(model, optimizer, tokens, targets));
    answer.times_ms.push(performance.now() - start);
  }
  answer.after = Object.fromEntries(Object.entries(weights).map(([name, w]) => [name, list(w)]));
}
process.stdout.write(JSON.stringify(answer));
