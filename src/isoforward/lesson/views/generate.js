"use strict";
// One forward pass after another, with and without a KV cache: the same text at another price.

const MOST_GENERATED = 64,
  SHOWN_PASSES = 12;

function generateView() {
  const complaint = el("p", { class: "complaint", role: "alert" });
  const prompt = el("input", {
    type: "text",
    id: "generate-prompt",
    dir: "auto",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => restart(),
  });
  const step = button("generate.step", () => next(), { class: "main" }),
    play = button("generate.play", () => toggle());
  const cached = el("input", { type: "checkbox", role: "switch", checked: true, onchange: () => render() });
  const text = el("pre", { class: "text", dir: "auto", tabindex: 0 }),
    grid = el("div", { class: "passes" }),
    counters = el("div"),
    same = el("p", { role: "status" });
  const recorded = el("div");
  let runs = null,
    passes = [],
    timer = null;

  const root = part(
    2,
    "generate",
    recorded,
    field("prompt", prompt),
    complaint,
    el(
      "div",
      { class: "controls" },
      step,
      play,
      button("generate.restart", () => restart()),
      el("label", { class: "switch" }, cached, say("span", "generate.cache")),
    ),
    text,
    same,
    el(
      "div",
      { class: "two" },
      el("div", {}, say("h3", "generate.passes"), say("p", "generate.passes.note", { class: "note" }), grid),
      el("div", {}, say("h3", "generate.cost"), counters),
    ),
  );

  function restart() {
    stop();
    passes = [];
    if (!prompt.dataset.begun) [prompt.value, prompt.dataset.begun] = [page.prompt, "yes"];
    const capacity = Math.min(MOST_GENERATED, page.model.config.context),
      ids = encoded(prompt.value, Math.floor(capacity / 2), complaint);
    const run = (cached) => new Generation(page.model, ids, { cached, capacity });
    runs = ids && { prompt: ids, capacity, on: run(true), off: run(false) };
    render();
  }

  const finished = () =>
    !runs || runs.on.tokens.length >= runs.capacity || page.tokenizer.ends.includes(passes.at(-1)?.on.token);

  // Both ways run, so that the switch can compare what really was.
  function next() {
    if (!finished()) passes.push({ on: runs.on.next(), off: runs.off.next() });
    if (finished()) stop();
    render();
  }

  function toggle() {
    if (timer) stop();
    else if (!finished()) timer = setInterval(next, 500);
    render();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
  }

  function render() {
    play.dataset.t = timer ? "generate.pause" : "generate.play";
    play.textContent = t(play.dataset.t);
    step.disabled = play.disabled = finished();
    if (!runs) return [text, same, grid, counters].forEach((each) => each.replaceChildren());
    const kind = cached.checked ? "on" : "off",
      { prompt: ids } = runs;
    const said = page.tokenizer.decode(runs[kind].tokens.slice(ids.length));
    text.replaceChildren(el("span", {}, prose(page.tokenizer.decode(ids))), el("mark", {}, prose(said)));
    text.setAttribute("aria-label", t("generate.text"));
    drawPasses(kind);
    drawCounters();
    if (!passes.length) return (same.textContent = t("generate.begin"));
    const alike = passes.filter(({ on, off }) => on.token === off.token).length;
    const apart = passes.reduce(
      (most, { on, off }) => on.logits.reduce((m, x, i) => Math.max(m, Math.abs(x - off.logits[i])), most),
      0,
    );
    same.textContent = t("generate.same", { alike, count: passes.length, apart: apart ? apart.toExponential(1) : "0" });
  }

  function drawPasses(kind) {
    const first = Math.max(0, passes.length - SHOWN_PASSES);
    grid.replaceChildren(
      ...passes.slice(first).map((each, i) => {
        const { computed, past, flops: count, bytes: moved, token: id } = each[kind],
          number = first + i + 1;
        const cells = Array.from({ length: past + computed }, (_, s) =>
          el("i", { class: s < past ? "kv" : "forward" }),
        );
        const label = t("generate.pass", { number, computed, past });
        return el(
          "div",
          { class: "pass" },
          el("span", { class: "cells", role: "img", "aria-label": label, title: label }, cells),
          el("span", {}, token(id)),
          el("small", {}, `${flops(count)} · ${bytes(moved)}`),
        );
      }),
    );
  }

  function drawCounters() {
    const last = passes.at(-1),
      sum = (kind, what) => passes.reduce((total, each) => total + each[kind][what], 0);
    const row = (name, format, on, off) => [t(name), format(on), format(off), on ? times(off / on) : ""];
    const rows = last
      ? [
          row("generate.flops_token", flops, last.on.flops, last.off.flops),
          row("generate.bytes_token", bytes, last.on.bytes, last.off.bytes),
          row("generate.flops", flops, sum("on", "flops"), sum("off", "flops")),
          row("generate.bytes", bytes, sum("on", "bytes"), sum("off", "bytes")),
          row("generate.time", (ms) => seconds(ms / 1e3), sum("on", "time_ms"), sum("off", "time_ms")),
        ]
      : [];
    if (!last) return counters.replaceChildren(el("p", { class: "note" }, t("generate.cost.note")));
    counters.replaceChildren(
      table(["", t("generate.on"), t("generate.off"), t("generate.ratio")], rows, { class: "numbers" }),
      el("p", { class: "note" }, t("generate.cost.note")),
    );
  }

  // Of `generate.py explain=html`: the passes as they ran in Python. A draft lets one pass give several tokens.
  function drawRecorded() {
    const { generation } = page;
    if (!generation) return;
    const line = ({ pass, context, time_s, top, chosen }) => [
      pass == null ? "" : String(pass),
      pass == null ? "" : t(pass === 1 ? "prefill" : "decode"),
      pass == null ? "" : String(context),
      pass == null ? "" : seconds(time_s),
      top.map(([id, p]) => el("span", { class: "thought" }, token(id), ` ${percent(p)} `)),
      el("b", {}, token(chosen)),
    ];
    const heads = ["", t("phase"), t("generate.sees"), t("time"), t("forward.likeliest"), t("generate.chosen")];
    recorded.replaceChildren(
      el("h3", {}, t("generate.recorded")),
      el("p", { class: "note" }, t("generate.recorded.note")),
      table(heads, generation.tokens.map(line), { class: "recorded" }),
    );
  }

  return {
    root,
    restart,
    render: () => {
      drawRecorded();
      if (runs) render();
      else restart();
    },
    next,
    passes: () => passes,
  };
}
