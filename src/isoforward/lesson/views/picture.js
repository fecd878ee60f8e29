"use strict";
// The first thing seen: both lives as two lanes of one scale, which begin with the same forward.

const PHASES = ["forward", "loss", "backward", "optimizer"];

function pictureView() {
  const lanes = el("div", { class: "lives" }),
    scale = el("p", { class: "note" }),
    live = el("p", { class: "live" });
  const root = el(
    "section",
    { id: "both", "aria-labelledby": "both-title" },
    say("h1", "both.title", { id: "both-title" }),
    say("p", "both.lede", { class: "lede" }),
    lanes,
    scale,
    live,
  );

  // Seconds as measured, else the FLOPs' own proportion: a backward has two products for each of the forward's.
  function lane(life, sizes, whole, measured) {
    const boxes = Object.entries(sizes).map(([phase, size]) =>
      el(
        "a",
        {
          class: `phase ${phase}`,
          href: life === "training" ? "#train" : "#generate",
          style: `flex-grow:${size / whole}`,
          "aria-label": `${t(phase)} ${measured ? seconds(size) : ""}`,
        },
        el("b", {}, t(phase)),
        measured ? el("small", {}, seconds(size)) : null,
      ),
    );
    const used = Object.values(sizes).reduce((a, b) => a + b);
    const key = Object.entries(sizes).map(([phase, size]) =>
      el("span", {}, el("i", { class: `swatch ${phase}` }), t(phase), measured ? ` ${seconds(size)}` : ""),
    );
    return el(
      "div",
      { class: "life" },
      el("h3", {}, t(`both.${life}`)),
      el(
        "div",
        { class: "lane" },
        boxes,
        el(
          "span",
          { class: "rest", style: `flex-grow:${Math.max(0, 1 - used / whole)}` },
          el("em", {}, t(`both.${life}.after`)),
        ),
      ),
      el("p", { class: "key" }, key),
      el("p", { class: "after" }, "↻ ", t(`both.${life}.loop`)),
    );
  }

  function render() {
    const { training, inference } = page.measured.lanes ?? {
      training: { forward: 1, loss: 0.03, backward: 2, optimizer: 0.03 },
      inference: { forward: 1 },
    };
    const measured = Boolean(page.measured.lanes),
      whole = Object.values(training).reduce((a, b) => a + b);
    lanes.replaceChildren(lane("training", training, whole, measured), lane("inference", inference, whole, measured));
    scale.textContent = measured ? t("both.scale", { machine: page.measured.machine }) : t("both.unmeasured");
    const prompt = page.tokenizer.encode(page.prompt),
      chosen = lastLogits(page.model, prompt.length ? prompt : [0], null);
    const best = argmax(chosen),
      p = softmax(chosen)[best];
    live.replaceChildren(
      t("both.live", { parameters: page.parameters.toLocaleString("en") }),
      " ",
      el("bdi", { class: "token" }, visible(page.prompt)),
      " → ",
      token(best),
      ` ${percent(p)}`,
    );
  }
  return { root, render };
}
