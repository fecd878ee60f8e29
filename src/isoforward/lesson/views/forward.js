"use strict";
// One forward of a prompt, from tokens to probabilities, with two magnifying glasses.

const MOST_SEEN = 48;

function forwardView() {
  const complaint = el("p", { class: "complaint", role: "alert" });
  const prompt = el("input", {
    type: "text",
    id: "forward-prompt",
    dir: "auto",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => render(),
  });
  const chips = el("div", { class: "chips" }),
    stream = el("div"),
    likeliest = el("ol", { class: "likeliest" });
  const layer = chooser(),
    head = chooser(),
    matrix = el("div", { class: "matrix" }),
    looks = el("div");
  const product = el("select", { onchange: () => zoom() });
  const output = el("input", { type: "number", min: 0, value: "", onchange: () => zoom() }),
    terms = el("div");
  let tokens = [],
    position = 0,
    made = null;

  const root = part(
    1,
    "forward",
    field("prompt", prompt),
    complaint,
    say("p", "forward.tokens", { class: "note" }),
    chips,
    el(
      "div",
      { class: "two" },
      el("div", {}, say("h3", "forward.stream"), say("p", "forward.stream.note", { class: "note" }), stream),
      el("div", {}, say("h3", "forward.likeliest"), say("p", "forward.likeliest.note", { class: "note" }), likeliest),
    ),
    el(
      "div",
      { class: "two" },
      el(
        "div",
        {},
        say("h3", "forward.attention"),
        say("p", "forward.attention.note", { class: "note" }),
        el("div", { class: "controls" }, field("layer", layer), field("head", head)),
        matrix,
        looks,
      ),
      el(
        "div",
        {},
        say("h3", "forward.product"),
        say("p", "forward.product.note", { class: "note" }),
        el("div", { class: "controls" }, field("forward.matrix", product), field("forward.output", output)),
        terms,
      ),
    ),
  );

  function chooser() {
    return el("select", { onchange: () => zoom() });
  }

  function numbered(select, count) {
    if (!select.options.length)
      select.append(...Array.from({ length: count }, (_, i) => el("option", { value: i }, String(i + 1))));
  }

  function render() {
    if (!prompt.dataset.begun) [prompt.value, prompt.dataset.begun] = [page.prompt, "yes"];
    const found = encoded(prompt.value, Math.min(MOST_SEEN, page.model.config.context), complaint);
    if (!found) return;
    const same = found.length === tokens.length && found.every((id, i) => id === tokens[i]);
    if (!same) position = found.length - 1;
    tokens = found;
    made = forward(page.model, tokens);
    draw();
  }

  function draw() {
    const { layers, heads, width: C, vocab: V } = page.model.config;
    refill(
      chips,
      tokens.map((id, i) =>
        el(
          "button",
          {
            type: "button",
            class: "chip",
            "aria-pressed": String(i === position),
            title: `${t("position", { position: i + 1 })}, id ${id}`,
            onclick: () => {
              position = i;
              draw();
            },
          },
          token(id),
          el("small", {}, String(id)),
        ),
      ),
    );
    const stages = [
      ["embedding", made.kept.blocks[0].x],
      ...made.kept.blocks.map((block, n) => [t("block", { n: n + 1 }), block.out]),
    ];
    stages[0][0] = t("embedding");
    stream.replaceChildren(
      el(
        "ol",
        { class: "stages" },
        stages.map(([name, x]) => {
          const row = x.subarray(position * C, (position + 1) * C),
            [best, p] = likely(row);
          return el(
            "li",
            {},
            el("span", {}, name),
            heat(row, 1, C, `${name}: ${t("forward.size", { size: digits(size(row)) })}`),
            el("span", { class: "lens" }, token(best), ` ${percent(p)}`),
          );
        }),
      ),
    );
    const row = softmax(made.logits.slice(position * V, (position + 1) * V));
    const top = Array.from(row.keys())
      .sort((a, b) => row[b] - row[a])
      .slice(0, 5);
    likeliest.replaceChildren(
      ...top.map((id) => el("li", {}, token(id), bar(row[id]), el("span", { class: "figure" }, percent(row[id])))),
    );
    numbered(layer, layers);
    numbered(head, heads);
    const kind = product.value;
    product.replaceChildren(
      ...["head", "up"].map((name) => el("option", { value: name }, t(`forward.product.${name}`))),
    );
    product.value = kind || "head";
    zoom();
  }

  // What the head would say if the stream ended here.
  function likely(row) {
    const { model } = page,
      final = norm(row, 1, model.layer("norm"), model.config.norm_eps, !model.llama);
    const logits = model.logits(final.y),
      best = argmax(logits);
    return [best, softmax(logits)[best]];
  }

  function zoom() {
    const T = tokens.length,
      n = Number(layer.value),
      h = Number(head.value),
      block = made.kept.blocks[n];
    const weights = block.attended.weights.subarray(h * T * T, (h + 1) * T * T);
    matrix.replaceChildren(
      heat(weights, T, T, t("forward.attention.label", { layer: n + 1, head: h + 1, count: T })),
      el("i", { style: `top:${(100 * position) / T}%;height:${100 / T}%` }),
    );
    const row = weights.subarray(position * T, (position + 1) * T);
    const order = Array.from(row.keys())
      .slice(0, position + 1)
      .sort((a, b) => row[b] - row[a])
      .slice(0, 5);
    looks.replaceChildren(
      el("p", { class: "note" }, t("forward.looks"), " ", token(tokens[position]), " (", String(position + 1), "):"),
      el(
        "ol",
        { class: "likeliest" },
        order.map((s) =>
          el(
            "li",
            {},
            el("span", {}, token(tokens[s]), ` ${s + 1}`),
            bar(row[s], "kv"),
            el("span", { class: "figure" }, percent(row[s])),
          ),
        ),
      ),
    );
    oneProduct(n, block);
  }

  function oneProduct(n, block) {
    const { config, weights, llama, head: name } = page.model,
      C = config.width,
      V = config.vocab,
      up = llama ? "gate_up" : "up";
    const isHead = product.value === "head",
      m = isHead ? V : block.up.length / tokens.length;
    const x = (isHead ? made.kept.hidden : block.norm2.y).subarray(position * C, (position + 1) * C);
    const result = (isHead ? made.logits : block.up).subarray(position * m, (position + 1) * m);
    const which = output.value === "" ? argmax(result) : Math.min(m - 1, Math.max(0, Math.floor(Number(output.value))));
    output.max = m - 1;
    output.placeholder = String(argmax(result));
    const layerName = `blocks.${n}.mlp.${up}`,
      w = weights[isHead ? name : `${layerName}.weight`].subarray(which * C, (which + 1) * C);
    const bias = isHead ? 0 : (weights[`${layerName}.bias`]?.[which] ?? 0);
    const order = Array.from(x.keys()).sort((a, b) => Math.abs(x[b] * w[b]) - Math.abs(x[a] * w[a]));
    const rest = order.slice(5).reduce((sum, i) => sum + x[i] * w[i], 0),
      fixed = (v) => v.toFixed(4);
    const what = isHead
      ? [t("forward.logit"), " ", token(which)]
      : [t("forward.feature", { feature: which, layer: n + 1 })];
    terms.replaceChildren(
      el("p", { class: "note" }, what),
      table(
        ["i", "x[i]", "W[i]", "x[i] × W[i]"],
        [
          ...order.slice(0, 5).map((i) => [String(i), fixed(x[i]), fixed(w[i]), fixed(x[i] * w[i])]),
          [t("forward.others", { count: C - 5 }), "", "", fixed(rest)],
          ...(bias ? [[t("forward.bias"), "", "", fixed(bias)]] : []),
          [el("b", {}, t("sum")), "", "", el("b", {}, fixed(result[which]))],
        ],
        { class: "numbers" },
      ),
    );
  }
  return { root, render };
}
