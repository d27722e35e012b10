"""`watch` follows runs while they write, and shows them in a browser."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from support.left_runs import left_run

from megatron_sep.report.follow import Follower
from megatron_sep.report.watch import Watched, WatchError, bound, page

SETTINGS = {"model.sequence_length": 8}
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def line(step: int, **more: float) -> str:
    return (
        json.dumps({"step": step, "time": 0.0, "train/loss": 9 - step / 10, "train/consumed": 4 * step, **more}) + "\n"
    )


def test_a_torn_line_waits_and_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    """Each whole line comes once; after a rollback the rows are those of the new file."""
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    follower.look(SETTINGS)
    assert follower.rows == []
    path.write_text(line(1) + line(2)[:12])
    follower.look(SETTINGS)
    assert [row["step"] for row in follower.rows] == [1]
    with path.open("a") as file:
        file.write(line(2)[12:])
    follower.look(SETTINGS)
    assert [(row["step"], row["tokens"]) for row in follower.rows] == [(1, 32), (2, 64)]
    assert follower.generation == 0
    path.write_text(line(1, **{"train/lr": 0.5}) + line(3) + line(4))
    follower.look(SETTINGS)
    assert ([row["step"] for row in follower.rows], follower.generation) == ([1, 3, 4], 1)


def test_seconds_and_operations_are_those_of_the_steps(tmp_path: Path) -> None:
    """A pause between two lines adds nothing; a validation stands where the last steps ended."""
    speed = {"speed/step_seconds": 2.0, "speed/model_flops": 10.0}
    (tmp_path / "metrics.jsonl").write_text(line(5, **speed) + '{"step": 5, "valid/loss": 3.0}\n' + line(15, **speed))
    follower = Follower(tmp_path)
    follower.look(SETTINGS)
    assert [(row["seconds"], row["flops"]) for row in follower.rows] == [(10, 100), (10, 100), (30, 300)]


def test_runs_come_later_and_go(tmp_path: Path) -> None:
    """A folder that is not there yet is waited for; a page gets what is new to it; a deleted run is told no more."""
    watched = Watched([tmp_path / "runs"])
    assert watched.look({}) == {"runs": [], "waiting": [str(tmp_path / "runs")]}
    left_run(tmp_path / "runs" / "a", {"window": None})
    (run,) = watched.look({})["runs"]
    assert (run["name"], len(run["rows"]), run["first"], run["checkpoints"]) == ("a", 40, 0, [400])
    with (tmp_path / "runs" / "a" / "metrics.jsonl").open("a") as file:
        file.write(line(420))
    (run,) = watched.look({"a": (run["generation"], 40)})["runs"]
    assert (run["first"], [row["step"] for row in run["rows"]]) == (40, [420])
    shutil.rmtree(tmp_path / "runs" / "a")
    assert watched.look({})["runs"] == []


def test_a_taken_port_is_refused_where_it_was_named() -> None:
    """Two at once stand at different ports, unless the second was told which."""
    first = bound("127.0.0.1", 0)
    with pytest.raises(WatchError, match="leave --port out"):
        bound("127.0.0.1", first.getsockname()[1])
    one, two = bound("127.0.0.1", None), bound("127.0.0.1", None)
    assert one.getsockname()[1] != two.getsockname()[1]
    for listener in (first, one, two):
        listener.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder of runs and the address of its page."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(page(Watched([tmp_path / "runs"]), "127.0.0.1"), log_level="warning"))
    listener: socket.socket = bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield tmp_path / "runs", f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_only_the_page_is_served(served: tuple[Path, str]) -> None:
    """No URL is a path, other hosts' names are refused, and what no page sends is a mistake of the sender."""
    import httpx

    runs, address = served
    left_run(runs / "a", {"window": None})
    for path in (
        "/../runs/a/metrics.jsonl",
        "/runs/a/metrics.jsonl",
        "/%2e%2e/figures.py",
        "//etc/passwd",
        "/uPlot.LICENSE",
    ):
        assert httpx.get(address + path).status_code == 404
    assert httpx.get(address, headers={"Host": "elsewhere.example"}).status_code == 400
    for wrong in (b"", b"[1]", b'{"a": 3}', b'{"a": [1, 2, 3]}', b'{"a": [1e999, 0]}'):
        assert httpx.post(f"{address}/data", content=wrong).status_code == 400
    assert httpx.post(f"{address}/data", content=b'{"a": [0, 99999]}').json()["runs"][0]["first"] == 0


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_in_a_browser(served: tuple[Path, str], browser: Any, tmp_path: Path) -> None:
    """Curves of two runs at both widths; zoom, smoothing, exports; a run that goes on, a new one, one that goes."""
    from playwright.sync_api import expect

    runs, address = served
    left_run(runs / "a", {"window": None})
    left_run(runs / "b", {"window": 64}, gap=0.02, visible=0.2)
    look = {f"attention/mass/sep/{kind}": 0.25 for kind in ("first", "separators", "window", "rest")}
    with (runs / "b" / "metrics.jsonl").open("a") as written:
        written.write("".join(json.dumps({"step": step, **look}) + "\n" for step in (200, 400)))
    (runs / "b" / "history.jsonl").write_text('{"time": 1, "event": "spike", "step": 200, "message": "<b>x</b>"}\n')
    faults: list[str] = []
    tab = browser.new_page(viewport=DESKTOP)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    tab.on("request", lambda asked: None if asked.url.startswith((address, "blob:")) else faults.append(asked.url))
    tab.goto(address)
    rows = tab.locator("#runs tbody tr")
    expect(rows).to_have_count(2)
    assert tab.locator("#figure-loss canvas").is_visible()
    assert tab.locator("#figure-mfu").is_hidden()
    assert tab.locator("#figure-mass_sep .u-legend .u-series").count() == 1 + 4
    assert tab.locator("#figure-mass_full").is_hidden()
    assert "<b>x</b>" in tab.locator("#events").inner_text()
    with tab.expect_download() as file:
        tab.click("#figure-gap button:text('CSV')")
    gaps = [float(row.split(",")[-1]) for row in file.value.path().read_text().splitlines()[1:]]
    assert gaps == pytest.approx([0.02] * 20, abs=1e-9)
    with tab.expect_download() as file:
        tab.click("#figure-loss button:text('PNG')")
    assert file.value.path().read_bytes().startswith(b"\x89PNG")
    over = tab.locator("#figure-loss .u-over").bounding_box()
    tab.mouse.move(over["x"] + over["width"] / 2, over["y"] + 50)
    tab.mouse.down()
    tab.mouse.move(over["x"] + over["width"] * 0.9, over["y"] + 60, steps=5)
    tab.mouse.up()
    tab.locator("#smooth").fill("3")
    assert tab.locator("#reach").inner_text() == "± 5 lines"
    assert tab.locator("#figure-loss .u-legend .u-series").count() == 1 + 8
    assert tab.locator("#figure-loss .u-legend .u-series:visible").count() == 1 + 4
    script = "async ([values, reach]) => (await import('./series.js')).smoothed(values, reach)"
    values = [float(i * i % 17) for i in range(30)]
    means = [fmean(values[i - near : i + near + 1]) for i in range(30) for near in [min(4, i, 29 - i)]]
    assert tab.evaluate(script, [values, 4]) == pytest.approx(means)
    left_run(runs / "c", {"window": 64}, last=100)
    with (runs / "a" / "metrics.jsonl").open("a") as written:
        written.write(line(440))
    shutil.rmtree(runs / "b")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("440/400")
    expect(rows.nth(1)).to_contain_text("deleted")
    tab.screenshot(path=tmp_path / "desktop.png", full_page=True)
    tab.set_viewport_size(PHONE)
    tab.wait_for_timeout(300)
    tab.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert faults == []
