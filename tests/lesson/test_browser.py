"""The page in a real browser: no request, no complaint, both widths, day and night, by keyboard, in both languages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isoforward.base.results import read
from isoforward.lesson.page import build_page, write_page
from isoforward.model.loss import next_token_loss
from isoforward.serve.inference import load
from tests.browser import Browser, chromium

from .conftest import Lesson, make_export, make_lesson
from .test_numbers import RECORDED, as_the_page_has_them, data_of

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="the lesson is looked at in a real browser: install chromium"
)
TAB, ENTER = ("Tab", 9), ("Enter", 13)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As after `make train`: a model of the size of model=tiny, and the rows of a run."""
    directory = tmp_path_factory.mktemp("whole")
    export = make_export(directory / "export", family="gpt2", layers=4, heads=4, width=128, vocab=1024)
    results = read(RECORDED / "phase_costs" / "results.jsonl")
    return write_page(build_page(load(export), results, name="a run"), directory / "lesson.html")


def calm(browser: Browser, page: Path) -> None:
    assert browser.complaints() == []
    assert browser.requested() == [page.as_uri()]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_page_computes_what_torch_computes(browser: Browser, tmp_path: Path, family: str) -> None:
    lesson = make_lesson(tmp_path, family=family, layers=2, heads=4, width=32)
    browser.open(lesson.page, width=1440)
    told: dict[str, Any] = browser.ask(
        """(() => {
          const ids = [5, 3, 9, 1, 7, 7, 2], { logits, kept } = forward(page.model, ids.slice(0, -1));
          const { loss, gradient } = lossOf(logits, ids.slice(1)), gradients = backward(page.model, kept, gradient);
          const texts = [true, false].map((cached) => {
            const run = new Generation(page.model, ids, { cached, capacity: 20 });
            for (let i = 0; i < 10; i++) run.next();
            return run.tokens;
          });
          return { logits: [...logits], loss, texts,
                   gradients: Object.fromEntries(Object.entries(gradients).map(([name, g]) => [name, [...g]])) };
        })()"""
    )
    model = as_the_page_has_them(load(lesson.export).model, data_of(lesson.page.read_text("utf-8"))["model"])
    model.requires_grad_(True)
    tokens = torch.tensor([[5, 3, 9, 1, 7, 7, 2]])
    logits = model(tokens[:, :-1])
    loss = next_token_loss(logits, tokens[:, 1:])
    loss.backward()
    assert np.abs(np.array(told["logits"]) - logits.detach().flatten().numpy()).max() < 1e-4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        ours = torch.tensor(told["gradients"][name])
        assert float((ours - parameter.grad.flatten()).norm() / parameter.grad.norm()) < 1e-3, name
    with torch.no_grad():
        for _ in range(10):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
    assert told["texts"] == [tokens[0].tolist()] * 2
    calm(browser, lesson.page)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1440, "light"), (1440, "dark")])
def test_it_is_drawn_at_both_widths_by_day_and_by_night(browser: Browser, whole: Path, width: int, scheme: str) -> None:
    browser.open(whole, width=width, scheme=scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    first = browser.ask("(b => [b.top, b.bottom])(document.querySelector('.lives').getBoundingClientRect())")
    assert 0 < first[0] < first[1] < 900  # the picture of both lives is there before anything is scrolled
    shares = browser.ask("[...document.querySelectorAll('.life .phase')].map(b => b.getBoundingClientRect().width)")
    assert len(shares) == 5 and min(shares) >= 7
    assert (
        browser.ask("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(255, 255, 255)",
            "dark": "rgb(20, 23, 27)",
        }[scheme]
    )
    browser.ask("page.views.generate.next(); page.views.train.step(); page.views.guess.reveal(); 0")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    calm(browser, whole)


def test_it_speaks_the_browser_s_language_and_the_one_that_is_chosen(tmp_path: Path, whole: Path) -> None:
    browser = Browser(tmp_path / "profile", language="zh-CN")
    try:
        browser.open(whole, width=1440)
        assert browser.ask("[document.documentElement.lang, document.querySelector('h1').textContent]") == [
            "zh-Hans",
            "同一个前向，两种生活",
        ]
        for view in ("generate.next", "train.step", "guess.reveal"):
            browser.ask(f"page.views.{view}(); 0")
        browser.ask("document.querySelector('.languages [lang=en]').click()")
        assert browser.ask("document.querySelector('h1').textContent") == "One forward, two lives"
        assert browser.ask("/[\\u4e00-\\u9fff]/.test(document.querySelector('main').textContent)") is False
        calm(browser, whole)
    finally:
        browser.close()


def test_a_training_step_moves_probabilities_and_undo_brings_them_back(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=1440, motion="reduce")
    before = browser.ask("[...page.model.weights['embedding.weight'].slice(0, 50)]")
    browser.ask("page.views.train.step(); page.views.train.step(); 0")
    told = browser.ask("(({ loss, after }) => [loss, after.loss])(page.views.train.state())")
    assert told[1] < told[0]
    assert browser.ask("document.getElementById('changed').hidden") is False
    assert browser.ask("getComputedStyle(document.querySelector('.flow li')).animationName") == "none"
    order = browser.ask("[...document.querySelectorAll('.flow li > span:first-child')].map(e => e.textContent)")
    assert order == ["head", "block 4", "block 3", "block 2", "block 1", "embedding"]
    browser.ask("page.views.train.back(1); page.views.train.back(1); 0")
    assert browser.ask("[...page.model.weights['embedding.weight'].slice(0, 50)]") == before
    assert browser.ask("document.getElementById('changed').hidden") is True


def test_a_step_answers_at_once(browser: Browser, whole: Path) -> None:
    """Within 100 ms, of the page's own thread: other work of this machine does not count."""
    browser.open(whole, width=1440)
    browser.ask("changed = () => {}; 0")  # what the other parts do once the answer is there
    browser.call("Performance.enable")

    def spent_s(step: str) -> float:
        before = browser.thread_time_s()
        browser.ask(f"{step}(); 0")
        return browser.thread_time_s() - before

    for step in ("page.views.train.step", "page.views.generate.next"):
        took = [spent_s(step) for _ in range(8)]
        assert min(took) < 0.1, (step, took)


def test_frozen_it_holds_less_and_does_not_train(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=1440)
    wide = "[...document.querySelectorAll('.ledger .fill')].reduce((sum, e) => sum + parseFloat(e.style.inlineSize), 0)"
    assert browser.ask(wide) == pytest.approx(100, abs=0.1)
    browser.ask("page.views.freeze.freeze(true)")
    assert browser.ask(wide) < 30
    assert browser.ask("document.querySelector('#train button.main').disabled") is True
    browser.ask("page.views.freeze.freeze(false)")
    assert browser.ask("document.querySelector('#train button.main').disabled") is False


def test_a_step_is_undone_after_a_thaw_too(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=1440)
    before = browser.ask("[...page.model.weights['embedding.weight'].slice(0, 50)]")
    browser.ask("page.views.train.step(); page.views.freeze.freeze(true); page.views.freeze.freeze(false)")
    browser.ask("document.querySelector('[data-t=\"train.undo\"]').click(); page.views.train.step(); 0")
    browser.ask("document.querySelector('[data-t=\"train.reset\"]').click()")
    assert browser.ask("[...page.model.weights['embedding.weight'].slice(0, 50)]") == before
    calm(browser, whole)


def test_all_of_it_is_reached_and_worked_by_keyboard(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=1440)
    controls = browser.ask("document.querySelectorAll('main button:enabled, main input, main select').length")
    reached = set()
    for _ in range(controls + 40):
        browser.press(*TAB)
        reached.add(
            browser.ask(
                "(e => (e.closest('section')?.id ?? '') + ' ' + (e.dataset.t ?? e.id) + ' ' + e.tagName +"
                " (e.dataset.t == 'generate.step' ? ' here' : ''))(document.activeElement)"
            )
        )
        if any("here" in each for each in reached):
            break
    assert any(each.startswith("forward") and "SELECT" in each for each in reached)
    browser.press(*ENTER)
    assert browser.ask("page.views.generate.passes().length") == 1
    assert browser.ask("document.activeElement.dataset.t") == "generate.step"
    outline = browser.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_what_is_typed_shows_as_text(browser: Browser, whole: Path) -> None:
    browser.open(whole, width=1440)
    typed = "<img src=x onerror=hacked=1>\\u202eabc שלום"
    browser.ask(
        "for (const id of ['forward-prompt', 'generate-prompt', 'train-sentence']) {"
        f" const input = document.getElementById(id); input.value = '{typed}';"
        " input.dispatchEvent(new Event('input')) }"
    )
    browser.ask("page.views.generate.next(); page.views.train.step(); 0")
    assert browser.ask("document.querySelectorAll('img').length") == 0
    assert browser.ask("String(window.hacked)") == "undefined"
    shown = browser.ask("document.querySelector('#generate .text').textContent")
    assert "<img src=x" in shown and "‹202E›" in shown and "\u202e" not in shown
    calm(browser, whole)


def test_an_unknown_character_is_told(browser: Browser, tmp_path: Path) -> None:
    lesson: Lesson = make_lesson(tmp_path, kind="char", family="llama", layers=1, heads=2, width=16)
    browser.open(lesson.page, width=360)
    browser.ask(
        "(input => { input.value = 'Q9'; input.dispatchEvent(new Event('input')) })"
        "(document.getElementById('forward-prompt'))"
    )
    assert "never seen" in browser.ask("document.querySelector('#forward .complaint').textContent")
    calm(browser, lesson.page)
