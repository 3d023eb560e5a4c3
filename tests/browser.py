"""Debian's Chromium without a window, driven by Selenium: what it shows, says on its console, and asks the network for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--hide-scrollbars",
)
HERE = ("127.0.0.1", "localhost")


@contextlib.contextmanager
def browser(profile: Path, *, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A fresh browser; skips where Chromium, its driver or Selenium is not installed."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip(
            "Chromium or its driver is not installed (Debian: apt-get install chromium chromium-driver)"
        )
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `test`)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(60)
    driver.set_page_load_timeout(90)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """A Selenium driver with what these tests ask of it."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self._requests: list[str] = []

    def open(self, address: str) -> None:
        self.driver.get(address)

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the page's view, as a phone or a desk would have it."""
        values = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", values)

    def prefer(self, scheme: str, *, medium: str = "") -> None:
        """``light`` or ``dark``; ``medium`` is ``print`` or empty for a screen."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})

    def run(self, script: str, *given: object):
        return self.driver.execute_script(script, *given)

    def wait(self, script: str, *, seconds: float = 120.0) -> None:
        """Until the script returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds).until(lambda d: d.execute_script(script), script)

    def click(self, selector: str) -> None:
        """As a hand would: scrolled into view and hit in its middle."""
        from selenium.webdriver.common.by import By

        element = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def picture(self, file: Path, *, whole: bool = False) -> Path:
        """What is seen, or the whole page, as a PNG."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if whole:
            import base64

            found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
            file.write_bytes(base64.b64decode(found["data"]))
        else:
            self.driver.save_screenshot(str(file))
        return file

    def complaints(self) -> list[str]:
        """Errors on the console since the last call, a broken content policy among them."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """Every address that pages asked for, but data within the page."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"]["url"])
        return [url for url in self._requests if not url.startswith(("data:", "blob:", "about:", "chrome"))]

    def requests_elsewhere(self) -> list[str]:
        """Those that leave this machine."""
        return [
            url for url in self.requests() if not url.startswith("file:") and urlsplit(url).hostname not in HERE
        ]
