"""Pictures: what is drawn, in which colours, and what text may not do."""

import json

import pytest

from isoforward.show.charts import LIGHT, Bar, Chart, Part, bars, printable


def bar(*sizes: float) -> Bar:
    parts = [Part(name=f"part {n}", colour="#0072B2", size=size, said=f"{size:g}") for n, size in enumerate(sizes)]
    return Bar(label="a bar", total=f"{sum(sizes):g}", parts=parts)


def drawn(spec: dict[str, object], key: str) -> list[dict[str, float]]:
    """Every record of the drawing's data that has `key`."""
    found: list[dict[str, float]] = []

    def search(node: object) -> None:
        if isinstance(node, dict):
            found.extend([node] if key in node and "lane" in node else [])
            for value in node.values():
                search(value)
        elif isinstance(node, list):
            for value in node:
                search(value)

    search(spec)
    return found


@pytest.fixture(scope="module")
def chart() -> Chart:
    spec = bars([bar(1, 2), bar(2)], unit="s", legend=["part 0", "part 1"])
    return Chart(name="two", title="Three seconds & two", spec=spec, table=[])


def test_the_parts_of_a_bar_follow_each_other(chart: Chart) -> None:
    parts = {(p["lane"], p["start"], p["end"]) for p in drawn(chart.spec, "share")}
    assert parts == {(0, 0, 1), (0, 1, 3), (1, 0, 2)}


def test_a_bar_that_would_dwarf_the_others_is_cut() -> None:
    spec = bars([bar(1), bar(1.5), bar(100)], unit="s", legend=[])
    ends = {p["lane"]: p["end"] for p in drawn(spec, "share")}
    assert ends[0] == 1 and ends[1] == 1.5
    assert 1.5 < ends[2] < 3


def test_the_page_may_choose_its_colours_and_a_picture_alone_is_by_day(chart: Chart) -> None:
    assert "var(--" in json.dumps(chart.spec)
    assert "var(--" not in chart.by_day()
    assert LIGHT["paper"] in chart.by_day()


def test_a_picture_is_an_svg_of_text_or_a_png(chart: Chart) -> None:
    svg = chart.svg()
    assert svg.startswith("<svg") and "Three seconds &amp; two" in svg
    assert chart.png(scale=1.0).startswith(b"\x89PNG")


def test_a_strangers_text_stays_on_one_line_and_commands_nothing() -> None:
    assert printable("a\x1b[31m\nb\u202ec") == "a [31m b c"
    assert printable("x" * 10, longest=4) == "xxxx…"
