"""Drives the operators' console with a real browser: Chromium, by chromedriver's WebDriver protocol, which is JSON over
HTTP and needs no library.

    console.py ADDRESS TOKEN HOLDER WAITER SCREENSHOT

HOLDER and WAITER are ids of sessions, the second of which waits for the first. Signs in, sees both, ends HOLDER through
the dialog, and sees how it ended. Exits with 0 when all of it was so, the console was silent, and nothing was asked of
any other host.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

PATIENCE_S = 20
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    def __init__(self, size):
        program = shutil.which("chromedriver") or sys.exit("chromedriver is missing: run make browser")
        self.driver = subprocess.Popen([program, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        port = None
        while port is None:
            line = self.driver.stdout.readline() or sys.exit("chromedriver did not start")
            port = re.search(r"successfully on port (\d+)", line)
        self.url = f"http://127.0.0.1:{port[1]}"
        chrome = {"args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                           f"--user-data-dir={self.profile.name}", f"--window-size={size}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                  "timeouts": {"script": PATIENCE_S * 1000}}
        session = self.post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.url += f"/session/{session['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=PATIENCE_S)
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.profile.cleanup()

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=2 * PATIENCE_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            sys.exit(f"{path} {body}: {json.load(error)['value']['message']}")

    def until(self, condition):
        """Waits until an expression of JavaScript is true, looking at every frame."""
        script = f"const done = arguments[0]; (function look() {{ ({condition}) ? done(true) : requestAnimationFrame(look); }})();"
        self.post("/execute/async", {"script": script, "args": []})

    def find(self, selector):
        return self.post("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.post(f"/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        self.post(f"/element/{self.find(selector)}/value", {"text": text})

    def log(self, kind):
        return self.post("/se/log", {"type": kind})

    def screenshot(self, file):
        with urllib.request.urlopen(f"{self.url}/screenshot", timeout=PATIENCE_S) as answer:
            png = base64.b64decode(json.load(answer)["value"])
        with open(file, "wb") as out:
            out.write(png)


def shown(selector):
    return f"document.querySelector({json.dumps(selector)})?.checkVisibility()"


def says(selector, text):
    return f"document.querySelector({json.dumps(selector)})?.textContent.includes({json.dumps(text)})"


def main(address, token, holder, waiter, screenshot):
    with Browser("1400,900") as browser:
        browser.post("/url", {"url": f"http://{address}/console"})
        browser.until(shown("#token"))
        browser.type("#token", token)
        browser.click("#signin button")

        browser.until(shown(f"#rows [data-session='{holder}']"))
        browser.until(says(f"#rows tr[data-session='{waiter}']", "blocked"))
        browser.until(says("#tree > li > ul > li", waiter[:8]))
        browser.until(says("#tree > li > .node", holder[:8]))
        browser.screenshot(screenshot)

        browser.click(f"#rows button[data-session='{holder}']")
        browser.until(shown("#dialog"))
        # Without a reason nothing is sent.
        browser.click("#end")
        browser.type("#reason", "the browser's test")
        browser.click("#end")
        browser.until(says(f"#endings tr[data-session='{holder}']", "TERMINATED"))
        browser.until(f"!document.querySelector(\"#rows [data-session='{holder}']\")")
        browser.until(f"!({shown('#dialog')})")
        browser.until(says("#notes", f"{holder[:8]} is ended"))

        # The first question is asked without a token.
        said = [entry["message"] for entry in browser.log("browser")]
        odd = [line for line in said if "/console/events" not in line or "401" not in line]
        if odd or len(said) != 1:
            sys.exit(f"the browser's console says {said}")
        events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        # What begins otherwise is the browser's own: its empty page, and icons that are in their address.
        asked = [url for url in asked if url.startswith(("http", "ws"))]
        away = [url for url in asked if not url.startswith(f"http://{address}/console")]
        if away or not asked:
            sys.exit(f"the page asked for {away} among {asked}")
        if any(token in url for url in asked):
            sys.exit("the token is in an address")


if __name__ == "__main__":
    main(*sys.argv[1:])
