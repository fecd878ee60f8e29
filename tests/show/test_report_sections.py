"""What a figure says of itself, and what a download may hold."""

from dataclasses import replace
from urllib.parse import unquote

import pytest

from isoforward.show.compare import compare
from isoforward.show.report_sections import (
    comparison_of,
    doubts,
    download,
    every_row,
    figure,
    phase_table,
    pictured,
    slug,
)
from isoforward.show.row_charts import differing
from tests.show.planted import PLANTED, row


def test_a_figure_says_where_it_comes_from_and_whether_it_is_doubted() -> None:
    measured = row("training", "forward", 0.5)
    counted = row("training", "forward", 5.0, quantity="flops", unit="flop", convention="model")
    doubted = {"planted": "the machine was busy"}
    cell = figure(measured, doubted)
    assert (cell.text, cell.origin, cell.doubt) == ("500 ms", "measured", True)
    assert "median of 6 samples" in cell.hint and "the machine was busy" in cell.hint
    assert not figure(replace(counted, provenance="counted"), doubted).doubt


def test_what_is_not_there_is_called_unavailable_with_its_reason() -> None:
    gone = replace(
        row("training", "forward", 1.0), value=None, samples=(), provenance="unavailable", reason="no counter"
    )
    assert (figure(gone, {}).text, figure(gone, {}).hint) == ("unavailable", "no counter")
    assert figure(None, {}).hint == "no row tells it"


def test_the_doubts_of_an_experiment_are_its_verdicts() -> None:
    assert doubts(PLANTED) == {"planted": "planted"}


def test_the_phase_table_has_a_line_for_every_phase() -> None:
    text = [cell.text for line in phase_table(compare(PLANTED)).rows for cell in line]
    assert {"forward", "loss", "backward", "optimizer"} <= set(text)
    assert "2.00 s" in text and "500 ms" in text


def test_rows_that_cannot_be_compared_have_no_comparison() -> None:
    assert comparison_of(PLANTED) is not None
    assert comparison_of(replace(PLANTED, rows=PLANTED.rows[1:3])) is None


def test_a_missing_picture_says_why() -> None:
    section = pictured("Memory", "no ledger was kept")
    assert section.chart is None and section.lede == "Unavailable: no ledger was kept."


def test_a_table_of_rows_names_what_varies_and_is_bounded() -> None:
    table, file = every_row(PLANTED, 3)
    assert len(table.rows) == 3
    assert "planted" in unquote(file.uri)
    assert differing(PLANTED.rows[:2]) == []


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x"])
def test_no_text_of_a_download_is_a_formula(text: str) -> None:
    held = unquote(download("rows", [{"a": text, "b": -1.5}]).uri)
    assert f"'{text}" in held and "-1.5" in held


@pytest.mark.parametrize(("name", "file"), [("../../etc/passwd", "etc_passwd"), ("a b", "a_b"), ("", "chart")])
def test_a_name_cannot_lead_a_file_elsewhere(name: str, file: str) -> None:
    assert slug(name) == file
