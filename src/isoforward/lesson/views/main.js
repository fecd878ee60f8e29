"use strict";
// Unpacks what page.py put in, builds the parts, and keeps them in step: one model, in both its lives.

const PARTS = ["forward", "generate", "train", "freeze", "guess"];

async function open() {
  const data = JSON.parse(document.getElementById("data").textContent),
    weights = await unpacked(data.model.weights);
  Object.assign(page, {
    text: data.text,
    measured: data.measured,
    prompt: data.prompt,
    sentence: data.sentence,
    generation: data.generation,
    languages: Object.keys(data.text.language),
    steps: 0,
    frozen: false,
    optimizer: null,
    model: new GPT(data.model.config, weights),
    tokenizer: new Tokenizer(data.tokenizer),
    parameters: Object.values(weights).reduce((sum, each) => sum + each.length, 0),
    exported: Object.fromEntries(Object.entries(weights).map(([name, each]) => [name, each.slice()])),
    matrices: data.model.weights.tensors
      .filter(({ name, shape }) => name.startsWith("blocks.") && shape.length === 2)
      .map(({ name }) => name),
  });
  page.language =
    page.languages.find((language) => navigator.language.toLowerCase().startsWith(language)) ?? page.languages[0];
  page.views = {
    both: pictureView(),
    forward: forwardView(),
    generate: generateView(),
    train: trainView(),
    freeze: freezeView(),
    guess: guessView(),
  };
  const switches = page.languages.map((language) =>
    el("button", { type: "button", lang: language, onclick: () => speak(language) }, page.text.language[language]),
  );
  const about = el("p", { class: "note about" });
  document.getElementById("lesson").replaceChildren(
    el(
      "header",
      {},
      el(
        "nav",
        { "aria-label": "isoforward" },
        PARTS.map((name, i) => el("a", { href: `#${name}` }, `${i + 1} `, say("span", `${name}.title`))),
      ),
      el("div", { class: "languages" }, switches),
      el("p", { id: "changed", role: "status", hidden: true }),
    ),
    el(
      "main",
      {},
      Object.values(page.views).map(({ root }) => root),
      about,
    ),
  );

  function speak(language) {
    page.language = language;
    document.documentElement.lang = t("language.tag");
    document.title = `${t("both.title")} · ${data.name}`;
    switches.forEach((each) => each.setAttribute("aria-pressed", String(each.lang === language)));
    for (const each of document.querySelectorAll("[data-t]")) each.textContent = t(each.dataset.t);
    about.textContent = t("about", { bits: data.model.bits, name: data.name });
    render();
  }
  speak(page.language);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  document.documentElement.dataset.ready = "yes";
  setTimeout(warmUp, 200);
}

// A step's first run would wait for the browser's compiler: this one is for it alone, and nothing is changed by it.
function warmUp() {
  const { model, learnt } = page,
    { logits, kept } = forward(model, learnt),
    spare = { spare: new Float32Array(2e5) };
  for (let i = 0; i < 2; i++) {
    backward(model, kept, logits);
    new AdamW(spare, []).step(spare);
  }
}

function render() {
  for (const view of Object.values(page.views)) view.render();
  tellChanged();
}

// The weights are others than before: everything that shows what they say says it again.
function changed() {
  page.views.both.render();
  page.views.forward.render();
  page.views.generate.restart();
  tellChanged();
}

function tellChanged() {
  const told = document.getElementById("changed");
  told.hidden = page.steps === 0;
  told.textContent = page.steps ? t("changed", { steps: page.steps }) : "";
}

if (typeof document !== "undefined") open();
