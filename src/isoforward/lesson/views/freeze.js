"use strict";
// What training holds and serving lets go of, in bytes of the arrays that this page really has.

function freezeView() {
  const ledger = el("div", { class: "ledger" }),
    list = el("ul", { class: "held" }),
    total = el("p", { role: "status" }),
    here = el("p", { class: "note" });
  const toggle = el("button", { type: "button", class: "main", onclick: () => freeze(!page.frozen) });
  const root = part(4, "freeze", el("div", { class: "controls" }, toggle), total, ledger, list, here);
  const sum = (arrays) => arrays.reduce((bytes, array) => bytes + array.byteLength, 0);

  function freeze(on) {
    page.frozen = on;
    if (on) page.optimizer = null; // its moments with it; gradients and activations belong to a step, and go with it
    page.views.train.begin();
  }

  // Every array that backward comes back for, once: a block's output is the next one's input.
  function activations(kept) {
    const found = new Set();
    const walk = (value) => {
      if (ArrayBuffer.isView(value)) found.add(value);
      else if (value && typeof value === "object") Object.values(value).forEach(walk);
    };
    walk(kept);
    return [...found];
  }

  let counted = null; // for the sentence that it was counted for

  function holdings() {
    const { model, learnt: ids } = page;
    if (counted?.ids === ids) return counted;
    const weights = sum(Object.values(model.weights)),
      { kept, logits } = forward(model, ids),
      cache = new KVCache(model.config, ids.length);
    return (counted = {
      ids,
      training: {
        weights,
        gradients: weights,
        optimizer: 2 * weights,
        activations: sum(activations(kept)),
        logits: 2 * logits.byteLength,
      },
      serving: { weights, kv: sum([...cache.keys, ...cache.values]) },
    });
  }

  function render() {
    if (!page.learnt) return;
    const { training, serving, ids } = holdings(),
      positions = ids.length,
      now = page.frozen ? serving : training;
    const whole = Object.values(training).reduce((a, b) => a + b),
      used = Object.values(now).reduce((a, b) => a + b);
    const kinds = [...Object.keys(training), "kv"];
    toggle.textContent = t(page.frozen ? "freeze.thaw" : "freeze.freeze");
    total.textContent = t(page.frozen ? "freeze.frozen" : "freeze.held", {
      size: bytes(used),
      whole: bytes(whole),
      ratio: times(whole / used),
      positions,
    });
    if (ledger.children.length !== kinds.length)
      ledger.replaceChildren(...kinds.map((kind) => el("span", { class: `fill ${kind}` })));
    kinds.forEach((kind, i) => {
      ledger.children[i].style.inlineSize = `${(100 * (now[kind] ?? 0)) / whole}%`;
    });
    list.replaceChildren(
      ...kinds
        .filter((kind) => kind in training || page.frozen)
        .map((kind) =>
          el(
            "li",
            { class: kind in now ? "" : "gone" },
            el("i", { class: `swatch ${kind}` }),
            el("b", {}, t(`freeze.${kind}`)),
            el("span", { class: "figure" }, bytes(now[kind] ?? training[kind])),
            el("small", {}, t(kind in now ? `freeze.${kind}.why` : `freeze.${kind}.gone`)),
          ),
        ),
    );
    const { memory } = page.measured;
    here.textContent = memory
      ? t("freeze.measured", {
          training: bytes(memory.training),
          serving: bytes(memory.serving),
          ratio: times(memory.training / memory.serving),
          machine: page.measured.machine,
        })
      : "";
  }
  return { root, render, freeze };
}
