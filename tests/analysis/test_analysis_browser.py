from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from analysis.report import find, write_report

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000"),
)
# Runs after the page's own script: switches to validation and reports what the plots hold.
PROBE = """<script>
const faults = [];
window.addEventListener("error", (event) => faults.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
window.addEventListener("load", () => setTimeout(() => {
  const y = () => JSON.stringify(document.getElementById("plot-1").data.map((trace) => trace.y));
  const before = y();
  document.querySelector("input[value=val]").click();
  const expected = JSON.stringify(document.getElementById("plot-1").data.map((trace) => trace.meta.val.y));
  document.body.setAttribute("data-switched", String(y() === expected && y() !== before));
  document.body.setAttribute("data-drawn", String(document.querySelectorAll(".main-svg").length > 0));
  document.body.setAttribute("data-faults", JSON.stringify(faults));
}, 1000));
</script></body>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize("name", ["report.html", "front.html"])
def test_the_page_draws_and_switches_without_a_fault_in_a_browser(small, tmp_path: Path, name: str):
    write_report(find(small, sweep="small", metric="val/acc_worst"), tmp_path)
    page = tmp_path / "probe.html"
    page.write_text((tmp_path / name).read_text().replace("</body>", PROBE))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    for fact in ('data-drawn="true"', 'data-switched="true"', 'data-faults="[]"'):
        assert fact in shown, [line for line in shown.splitlines() if "data-faults" in line][-1:]
