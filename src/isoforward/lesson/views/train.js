"use strict";
// One training step on a sentence of the reader's, a phase at a time; and training's forward against generation's.

const MOST_LEARNT = 21,
  MOST_UNDONE = 5;

function trainView() {
  const complaint = el("p", { class: "complaint", role: "alert" });
  const sentence = el("input", {
    type: "text",
    id: "train-sentence",
    dir: "auto",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => begin(),
  });
  const rate = el(
    "select",
    {
      onchange: () => {
        page.optimizer && (page.optimizer.lr = Number(rate.value));
      },
    },
    ["0.0003", "0.001", "0.003", "0.01"].map((lr) => el("option", { value: lr, selected: lr === "0.001" }, lr)),
  );
  const next = el("button", { type: "button", class: "main", onclick: () => phase() }),
    whole = button("train.whole", () => step());
  const undo = button("train.undo", () => back(1)),
    reset = button("train.reset", () => back(Infinity));
  const phases = el("ol", { class: "phases" }),
    outcome = el("p", { role: "status" }),
    targets = el("div"),
    flow = el("div"),
    forced = el("div");
  let run = null,
    undone = []; // weights and the optimizer's moments before each step

  const root = part(
    3,
    "train",
    el("div", { class: "controls" }, field("train.sentence", sentence), field("train.rate", rate)),
    complaint,
    el("div", { class: "controls" }, next, whole, undo, reset),
    phases,
    outcome,
    el(
      "div",
      { class: "two" },
      el("div", {}, say("h3", "train.targets"), say("p", "train.targets.note", { class: "note" }), targets),
      el("div", {}, say("h3", "train.flow"), say("p", "train.flow.note", { class: "note" }), flow),
    ),
    say("h3", "train.forcing"),
    say("p", "train.forcing.note", { class: "note" }),
    el(
      "div",
      { class: "controls" },
      button("train.check", () => check()),
    ),
    forced,
  );

  function begin() {
    if (!sentence.dataset.begun) [sentence.value, sentence.dataset.begun] = [page.sentence, "yes"];
    const ids = encoded(sentence.value, Math.min(MOST_LEARNT, page.model.config.context), complaint);
    if (ids && ids.length < 2) complaint.textContent = t("train.short");
    run = ids && ids.length > 1 ? { ids: ids.slice(0, -1), targets: ids.slice(1), done: 0, times: [], flow: [] } : null;
    if (run && String(run.ids) !== String(page.learnt)) page.learnt = run.ids;
    forced.replaceChildren();
    page.views.freeze.render();
    render();
  }

  const timed = (work) => {
    const start = performance.now();
    work();
    run.times.push(performance.now() - start);
    run.done++;
  };

  const WORK = [
    () => Object.assign(run, forward(page.model, run.ids)),
    () => Object.assign(run, lossOf(run.logits, run.targets)),
    () => {
      run.gradients = backward(page.model, run.kept, run.gradient, (stage, d) =>
        run.flow.push({ stage, size: size(d) }),
      );
    },
    () => {
      page.optimizer.lr = Number(rate.value);
      run.norm = page.optimizer.step(run.gradients);
    },
  ];

  function phase() {
    if (!run || page.frozen) return;
    if (run.done === 4) begin();
    if (run.done === 3) remember();
    timed(WORK[run.done]);
    if (run.done === 4) {
      const { loss, probabilities } = lossOf(forward(page.model, run.ids).logits, run.targets);
      run.after = { loss, probabilities };
      tellChanged();
      setTimeout(changed); // once this answer is on the screen, the other parts say what the new weights say
    }
    render();
  }

  function step() {
    do phase();
    while (run && !page.frozen && run.done < 4);
  }

  const copied = (arrays) => Object.fromEntries(Object.entries(arrays).map(([name, array]) => [name, array.slice()]));

  function remember() {
    page.optimizer ??= new AdamW(page.model.weights, page.matrices);
    const { steps, state } = page.optimizer;
    const moments = Object.entries(state).map(([name, each]) => [name, copied(each)]);
    undone.push({ weights: copied(page.model.weights), steps, moments });
    if (undone.length > MOST_UNDONE) undone.shift();
    page.steps++;
  }

  function back(count) {
    let before = null;
    if (count === Infinity) {
      before = { weights: page.exported, steps: 0 };
      [undone, page.steps, page.optimizer] = [[], 0, null];
    } else {
      before = undone.pop();
      page.steps--;
      page.optimizer ??= new AdamW(page.model.weights, page.matrices); // a frozen model has let go of it
      page.optimizer.steps = before.steps;
      for (const [name, moments] of before.moments) page.optimizer.state[name] = moments;
    }
    for (const [name, weight] of Object.entries(page.model.weights)) weight.set(before.weights[name]);
    tellChanged();
    setTimeout(changed);
    begin();
  }

  function render() {
    const done = run ? run.done : 0,
      idle = !run || page.frozen;
    next.textContent = t(done < 4 ? `train.next.${PHASES[done]}` : "train.again");
    next.disabled = whole.disabled = idle;
    undo.disabled = page.frozen || !undone.length;
    reset.disabled = page.frozen || !page.steps;
    phases.replaceChildren(
      ...PHASES.map((name, i) =>
        el(
          "li",
          { class: `${name}${i < done ? " done" : ""}`, "aria-current": i === done ? "step" : null },
          el("b", {}, t(name)),
          el("small", {}, i < done ? seconds(run.times[i] / 1e3) : t(`train.${name}`)),
        ),
      ),
    );
    outcome.textContent = page.frozen
      ? t("train.frozen")
      : !run
        ? ""
        : done < 2
          ? t("train.begin")
          : !run.after
            ? t("train.loss.told", { loss: digits(run.loss) })
            : t("train.after", {
                before: digits(run.loss),
                after: digits(run.after.loss),
                steps: page.steps,
                norm: digits(run.norm),
              });
    drawTargets();
    drawFlow();
  }

  function drawTargets() {
    const p = run?.probabilities,
      after = run?.after?.probabilities;
    targets.replaceChildren(
      run
        ? table(
            [t("train.sees"), t("train.target"), t("train.before"), t("train.later")],
            run.ids.map((id, i) => [
              token(id),
              token(run.targets[i]),
              p ? [bar(p[i]), percent(p[i])] : "",
              after
                ? [
                    bar(after[i], "optimizer"),
                    el(
                      "span",
                      { class: after[i] < p[i] ? "fell" : "rose" },
                      `${after[i] < p[i] ? "↓" : "↑"} ${percent(after[i])}`,
                    ),
                  ]
                : "",
            ]),
            { class: "targets" },
          )
        : "",
    );
  }

  // The gradient of the residual stream at each stage, from the head down; and that of each stage's own weights.
  function drawFlow() {
    if (!run?.gradients) return flow.replaceChildren(el("p", { class: "note" }, t("train.flow.wait")));
    const { layers } = page.model.config,
      most = Math.max(...run.flow.map((each) => each.size));
    const own = (belongs) =>
      Math.hypot(
        ...Object.entries(run.gradients)
          .filter(([name]) => belongs(name))
          .map(([, g]) => size(g)),
      );
    const stages = run.flow.map(({ stage, size: reached }, i) =>
      el(
        "li",
        { style: `--delay:${i * 120}ms` },
        el("span", {}, stage === layers ? t("train.flow.head") : t("block", { n: stage + 1 })),
        bar(reached / most, "backward"),
        el("span", { class: "figure" }, digits(reached)),
        el(
          "small",
          {},
          t("train.flow.own", {
            size: digits(
              stage === layers
                ? own((name) => name === page.model.head || name.startsWith("norm."))
                : own((name) => name.startsWith(`blocks.${stage}.`)),
            ),
          }),
        ),
      ),
    );
    flow.replaceChildren(
      el(
        "ol",
        { class: "flow" },
        stages,
        el(
          "li",
          { style: `--delay:${stages.length * 120}ms` },
          el("span", {}, t("embedding")),
          el("span"),
          el("span"),
          el(
            "small",
            {},
            t("train.flow.own", {
              size: digits(own((name) => name.startsWith("embedding.") || name.startsWith("positions."))),
            }),
          ),
        ),
      ),
    );
  }

  function check() {
    if (!run) return;
    const { logits } = forward(page.model, run.ids),
      one = oneByOne(page.model, run.ids);
    const apart = logits.reduce((most, x, i) => Math.max(most, Math.abs(x - one[i])), 0);
    const [all, single] = [logits, one].map((each) => lossOf(each, run.targets).probabilities);
    forced.replaceChildren(
      el(
        "p",
        { role: "status" },
        t("train.forced", { positions: run.ids.length, apart: apart ? apart.toExponential(1) : "0" }),
      ),
      table(
        [t("train.sees"), t("train.target"), t("train.once"), t("train.onebyone")],
        run.ids.map((id, i) => [token(id), token(run.targets[i]), all[i].toFixed(6), single[i].toFixed(6)]),
        { class: "numbers forcing" },
      ),
    );
  }
  return { root, render: () => (run ? render() : begin()), begin, step, phase, back, state: () => run };
}
