"use strict";
// A guess first, then the number of the reader's own results.jsonl. A question without its rows is not asked.

const LOWEST = 0.5,
  HIGHEST = 1000; // of a ratio; a share runs from 0 to 100 %

function guessView() {
  const questions = page.measured.questions,
    guesses = new Map();
  const progress = el("p", { class: "note" }),
    asked = el("h3", { id: "asked" }),
    value = el("output", { class: "guess" });
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 1000,
    value: 300,
    "aria-labelledby": "asked",
    oninput: () => moved(),
  });
  const show = button("guess.show", () => reveal(), { class: "main" }),
    answer = el("div", { role: "status" });
  const earlier = button("guess.earlier", () => go(-1)),
    later = button("guess.later", () => go(1)),
    score = el("p", { class: "note" });
  let at = 0;

  const root = part(
    5,
    "guess",
    questions.length
      ? el(
          "div",
          { class: "card" },
          progress,
          asked,
          el("div", { class: "slide" }, slider, value),
          show,
          answer,
          el("div", { class: "controls" }, earlier, later),
          score,
        )
      : say("p", "guess.none", { class: "note" }),
  );

  const isShare = (question) => question.unit === "%";
  const toValue = (place, question) =>
    isShare(question) ? place / 1000 : LOWEST * (HIGHEST / LOWEST) ** (place / 1000);
  const toPlace = (x, question) =>
    Math.max(0, Math.min(1, isShare(question) ? x : Math.log(x / LOWEST) / Math.log(HIGHEST / LOWEST)));
  const told = (x, question) => (isShare(question) ? percent(x) : times(x));

  function moved() {
    value.textContent = told(toValue(slider.value, questions[at]), questions[at]);
    slider.setAttribute("aria-valuetext", value.textContent);
  }

  function go(by) {
    at = Math.max(0, Math.min(questions.length - 1, at + by));
    slider.value = guesses.get(at) ?? (isShare(questions[at]) ? 500 : 300);
    render();
  }

  function reveal() {
    guesses.set(at, Number(slider.value));
    render();
  }

  // A share is close within 10 points, a ratio within a factor of 1.5.
  function close(question, guess) {
    const x = toValue(guess, question),
      low = question.low ?? question.value,
      high = question.high ?? question.value;
    return isShare(question) ? x >= low - 0.1 && x <= high + 0.1 : x >= low / 1.5 && x <= high * 1.5;
  }

  function render() {
    if (!questions.length) return;
    const question = questions[at],
      guess = guesses.get(at),
      known = guess !== undefined;
    progress.textContent = t("guess.progress", { at: at + 1, count: questions.length });
    asked.textContent = t(`guess.${question.name}`, question.at);
    slider.disabled = show.disabled = known;
    earlier.disabled = at === 0;
    later.disabled = at === questions.length - 1;
    moved();
    answer.replaceChildren(...(known ? revealed(question, guess) : []));
    const right = [...guesses].filter(([i, each]) => close(questions[i], each)).length;
    score.textContent = guesses.size ? t("guess.score", { right, count: guesses.size }) : "";
  }

  function revealed(question, guess) {
    const { value: x, low, high } = question,
      place = (v) => `${100 * toPlace(v, question)}%`;
    const ruler = el(
      "div",
      { class: "ruler", "aria-hidden": "true" },
      low == null
        ? null
        : el("i", {
            class: "interval",
            style: `inset-inline-start:${place(low)};inline-size:calc(${place(high)} - ${place(low)})`,
          }),
      el("i", { class: "yours", style: `inset-inline-start:${guess / 10}%` }),
      el("i", { class: "answer", style: `inset-inline-start:${place(x)}` }),
    );
    const found = t(low == null ? `guess.${question.provenance}` : "guess.interval", {
      value: told(x, question),
      low: low == null ? "" : told(low, question),
      high: high == null ? "" : told(high, question),
      kind: question.interval,
    });
    const doubts =
      question.provenance === "measured" && page.measured.doubts.length
        ? el(
            "details",
            { class: "doubt" },
            el("summary", {}, t("guess.doubt")),
            page.measured.doubts.map((doubt) => el("p", {}, doubt)),
          )
        : null;
    return [
      ruler,
      el(
        "p",
        {},
        el("b", {}, told(x, question)),
        " ",
        found,
        " ",
        t("guess.yours", { guess: told(toValue(guess, question), question) }),
      ),
      el("p", {}, t(`guess.${question.name}.why`, question.at)),
      doubts,
    ].filter(Boolean);
  }
  return { root, render, go, reveal, at: () => questions[at] };
}
