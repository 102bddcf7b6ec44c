"""The report in a real browser: no error, no sideways scrolling on a phone, legible in both themes.

A copy of the page gets a script that measures it. It stands in a frame as wide as a phone, because a window of
Chromium's is at least 500 pixels wide, and tells what it found to the page around it, which Chromium prints when all
is done. Nothing but Chromium itself is needed.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from linearize.benchmarks import plots
from linearize.benchmarks.files import write_json, write_text
from linearize.benchmarks.report import write_report
from tests.benchmark_results import fabricate_bench, fabricate_evaluation, fabricate_log

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
PHONE, DESK = 390, 1280

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium found; looked for {', '.join(NAMES)}"),
    pytest.mark.skipif(not plots.available(), reason="plots need matplotlib"),
]

# Contrast by WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of relative luminances.
SCRIPT = """
addEventListener("load", () => {
  for (const box of document.querySelectorAll("details")) box.open = true;
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = css => {
    const pair = [luminance(css), paper].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const faint = {};
  for (const element of document.querySelectorAll("p, li, td, th, dt, dd, a, h1, h2, h3, summary, figcaption, text")) {
    const style = getComputedStyle(element), drawn = element.tagName === "text";
    // A number on a heat map's cell is read against that cell.
    if (drawn && element.style.fill === "var(--paper)") continue;
    const value = contrast(drawn ? style.fill : style.color);
    if (value < 4.5) faint[element.textContent.trim().slice(0, 40)] = value;
  }
  const named = element => element.getAttribute("alt") ||
    (element.getAttribute("aria-labelledby") || "").split(" ")
      .map(id => document.getElementById(id)?.textContent || "").join("");
  const boxes = [...document.querySelectorAll("*")].filter(element =>
    ["auto", "scroll"].includes(getComputedStyle(element).overflowX) && element !== document.documentElement);
  const unreachable = [], unmarked = [];
  for (const box of boxes) {
    box.focus();
    if (document.activeElement !== box || box.tabIndex !== 0 || !box.getAttribute("aria-label"))
      unreachable.push(box.textContent.slice(0, 40));
    else if (getComputedStyle(box).outlineStyle === "none") unmarked.push(box.getAttribute("aria-label"));
  }
  const texts = [...document.querySelectorAll("svg text")].filter(text => {
    const own = text.getBoundingClientRect(), whole = text.closest("svg").getBoundingClientRect();
    return own.left < whole.left - 3 || own.right > whole.right + 3;
  });
  const found = {
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    pictures: document.querySelectorAll("svg, img").length,
    unnamed: [...document.querySelectorAll("svg, img")].filter(element => !named(element)).length,
    boxes: boxes.length,
    scrolling: boxes.filter(box => box.scrollWidth > box.clientWidth).length,
    unreachable, unmarked, faint,
    clipped: texts.map(text => text.textContent),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  parent.postMessage(JSON.stringify(found), "*");
});
"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><pre id="measured"></pre>
<script>addEventListener("message", event => measured.textContent = event.data);</script>
<iframe src="page.html" style="border: 0; width: %dpx; height: 2000px"></iframe>
"""


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium on a file, with a profile of its own and nothing that would use the network."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # which refuses to run as root
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(text: str, folder: Path, width: int, dark: bool) -> dict:
    """What the script finds in a page, and what the page wrote to the console."""
    write_text(folder / "page.html", text.replace("</head>", f"<script>{SCRIPT}</script></head>"))
    frame = write_text(folder / "frame.html", FRAME % width)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--window-size=1400,2100", "--hide-scrollbars", "--virtual-time-budget=10000", "--dump-dom"]
    done = browse(frame, folder, scheme, *options)
    found = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout, flags=re.S)
    assert found is not None, done.stderr
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    result["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # Else another page than the one that was asked for has been measured.
    assert (result["width"], result["dark"]) == (width, dark)
    return result


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A page with every section, and with names as long as they come."""
    folder = tmp_path_factory.mktemp("run")
    nll = {"original": 3.0, "control": 2.9, "window + sinks": 3.8, "window + sinks, trained": 3.6, "student": 3.4}
    nll |= {"student, state off": 3.9, "student, window off": 6.0, "student of a_rather_long_name_without_spaces": 3.5}
    right, found = dict.fromkeys(nll, 0.7) | {"student": 0.5}, dict.fromkeys(nll, 3) | {"original": 9}
    quality = fabricate_evaluation(nll, right, found)
    quality["machine"]["command"] += " --text " + "/".join(["a_folder_with_a_long_name"] * 12)
    quality["notes"] = ["a_note_without_a_space_" * 8]
    write_json(folder / "evaluate.json", quality)
    times = {
        "original": {1024: 20.0, 4096: 40.0, 8192: 70.0},
        "static": {1024: 22.0, 4096: 35.0, 8192: 60.0},
        "student": {1024: 30.0, 4096: 30.0, 8192: 30.0},
        "window + sinks, trained": {1024: 25.0, 4096: 25.0, 8192: 25.0},
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_json(folder / "bench.json", fabricate_bench(monkeypatch, times))
    write_text(folder / "train.jsonl", "".join(json.dumps(record) + "\n" for record in fabricate_log()))
    write_text(folder / "recipe.yaml", "model: package://some/Model-135M.gguf\n# " + 40 * "a long line " + "\n")
    return write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_page_in_a_browser(text, tmp_path, width, dark):
    found = measure(text, tmp_path, width, dark)
    assert found["console"] == []
    assert found["loaded"] == []
    assert found["page"] <= width
    assert (found["pictures"], found["unnamed"]) == (16, 0)
    assert found["boxes"] > 20
    assert found["unreachable"] == found["unmarked"] == []
    assert found["faint"] == {}
    assert found["clipped"] == []
    if width == PHONE:  # or nothing of it was tested
        assert found["scrolling"] > 3


def test_what_is_wrong_is_found(text, tmp_path):
    """The measurement itself: each of its findings, provoked."""
    wrong = (
        '<p style="color: #777">faint</p><div style="overflow-x: auto; width: 9rem">box</div>'
        '<svg width="9" height="9"><text x="40">outside</text></svg><div style="width: 600px">wide</div>'
        '<script>console.error("broken")</script>'
    )
    found = measure(text.replace("</main>", f"{wrong}</main>"), tmp_path, PHONE, dark=False)
    assert any("broken" in line for line in found["console"])
    assert found["page"] >= 600
    assert found["unnamed"] == 1
    assert found["unreachable"] == ["box"]
    assert list(found["faint"]) == ["faint"]
    assert found["clipped"] == ["outside"]


def test_page_on_paper(text, tmp_path):
    """Printing from a dark screen gives a light page of A4 sheets, with nothing folded away but data."""
    page, pdf = write_text(tmp_path / "page.html", text), tmp_path / "page.pdf"
    browse(page, tmp_path, "--blink-settings=preferredColorScheme=0", "--no-pdf-header-footer", f"--print-to-pdf={pdf}")
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF-")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 40
