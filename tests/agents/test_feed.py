"""CSV files as they come."""

from __future__ import annotations

import gzip
import os
from typing import TYPE_CHECKING

import pytest

from agents.feed import Feed, parse_time
from agents.market_data import MarketData
from mesh import ConfigurationError, EventType
from mesh.testing import AgentHarness

if TYPE_CHECKING:
    from pathlib import Path

MOMENT = "2013-01-01T22:00:00+00:00"


@pytest.mark.parametrize(
    "text",
    [
        "2013-01-01 22:00:00",
        "2013-01-01T22:00:00Z",
        "2013-01-01 22:00:00.000000+00:00",
        "2013-01-01T23:00:00+01:00",
        "1357077600",
        "1357077600000",
        "1357077600000000",
        "1357077600000000000",
    ],
)
def test_common_forms_of_time_are_read(text: str) -> None:
    assert parse_time(text).isoformat() == MOMENT


@pytest.mark.parametrize(
    "content",
    [
        f"timestamp,bid,ask\n{MOMENT},1.5,1.6\n",
        f"\ufefftimestamp,bid,ask\r\n{MOMENT},1.5,1.6\r\n",
        f"Ask;Time;Bid\n1.6;{MOMENT};1.5\n",
        f"{MOMENT},1.5,1.6\n",
        f"{MOMENT}\t1.5\t1.6",
        f"\n\ntimestamp,bid,ask,venue\n\n{MOMENT}, 1.5 ,1.6,x\n",
    ],
)
def test_ticks_are_read_however_they_were_written(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ticks.csv"
    path.write_text(content)
    feed = Feed(path)

    feed.check()
    (row,) = feed.rows()

    assert (row.time.isoformat(), row.bid, row.ask) == (MOMENT, 1.5, 1.6)
    assert feed.bad_rows == 0


BAD_ROWS = (
    "nan,1", "inf,1", "x,1", ",", "2,1", "-1,1", "0,1", "1", "1e200,1e200", "1e308,1.7e308",
    "1e-300,1",
)  # fmt: skip
#: In UTC they lie beyond the calendar.
BAD_TIMES = ("yesterday", "0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00")


def test_bad_rows_are_counted_and_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "ticks.csv"
    lines = ["timestamp,bid,ask", f"{MOMENT},1,2"]
    lines += [f"{MOMENT},{row}" for row in BAD_ROWS]
    lines += [f"{moment},1,2" for moment in BAD_TIMES]
    path.write_text("\n".join([*lines, f"{MOMENT},3,4"]))
    feed = Feed(path)

    feed.check()
    rows = list(feed.rows())

    assert [row.bid for row in rows] == [1, 3]
    assert feed.bad_rows == len(BAD_ROWS) + len(BAD_TIMES)
    assert feed.examples[0].startswith("line 3: bid nan")


def test_a_stray_quote_spoils_its_own_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "ticks.csv"
    good = [f'"{MOMENT}","1",2', f'{MOMENT},1,"2"']
    path.write_text("\n".join(["timestamp,bid,ask", *good, f'"{MOMENT},1,2', *good * 50]))
    feed = Feed(path)

    feed.check()
    rows = list(feed.rows())

    assert len(rows) == 102
    assert (feed.bad_rows, feed.examples) == (1, ["line 4: a quote is not closed"])


async def test_the_agent_says_how_many_rows_it_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ticks.csv"
    path.write_text("\n".join(["timestamp,bid,ask", *[f"{MOMENT},1,2"] * 3, *"abcd"]))

    async with AgentHarness(MarketData, params={"csv": str(path)}) as harness:
        report = (await harness.expect(EventType.MARKET_FEED_LOST)).data

    assert (report["rows"], report["bad_rows"]) == (3, 4)
    assert f"{path}: skipped 4 of 7 rows" in caplog.messages


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "empty"),
        ("\n\n", "empty"),
        ("a,b,c\n1,2,3\n", "columns a, b, c"),
        ("1,2\n", "2 columns without a header"),
        ("timestamp,bid,ask\n", "no usable row"),
        ("timestamp,bid,ask\nx,y,z\n", "no usable row; line 2"),
        (gzip.compress(b"a,b,c\n" * 99, mtime=0), "is compressed by gzip; unpack it first"),
        ("timestamp,bid,ask\n".encode("utf-16"), "is no text in UTF-8 but in UTF-16"),
        (b"\n\x00\x01\xff" * 1000, "is no text file"),
        ("timestamp,bid,ask,bid\n1,2,3,4\n", "more than one column is called bid"),
        ("x" * 200_000 + ",y\n", "its first line: field larger than field limit"),
        ("x" * 5000 + ",y\n", "columns x{100}[.]{3} are"),
        (
            "timestamp,bid,ask\n" + "x" * 5000 + ",y,z\n",
            "line 2: time 'x{100}[.]{3}' is no moment$",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told(
    tmp_path: Path, content: str | bytes | None, words: str
) -> None:
    path = tmp_path / "ticks.csv"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    with pytest.raises(ConfigurationError, match=words) as refused:
        Feed(path).check()

    assert str(refused.value).startswith(f"{path}: ")
    assert len(str(refused.value)) < 300 + len(str(path))


def test_a_row_with_a_control_character_is_a_bad_row(tmp_path: Path) -> None:
    """As a machine that lost its power leaves them."""
    path = tmp_path / "ticks.csv"
    path.write_text(f"timestamp,bid,ask\n{MOMENT},1,2\n" + "\0" * 50 + f"\n{MOMENT},1,2\n")
    feed = Feed(path)

    feed.check()

    assert len(list(feed.rows())) == 2
    assert feed.bad_rows == 1


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    with pytest.raises(ConfigurationError, match="is no regular file"):
        Feed(path).check()
