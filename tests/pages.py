"""Opens pages in Chromium, takes pictures of them, and looks for faults.

  python -m tests.pages REPORT.html ... [--out=DIR]
  python -m tests.pages build/docs/*.html --site=build/docs

Each page is shown 400 and 1400 pixels wide, light and dark. A fault is whatever a
page should never do: ask for anything beside itself, write to the console, scroll
sideways, show an image that cannot be read or a figure without lines, or let the
words of a figure overlap, cross its edge or be too small to read. It ends with exit code 1 if there
is one. Pages of a site may load the files of its folder. It needs Chromium, which no
other test does.
"""

import argparse
import base64
import contextlib
import fcntl
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

from moe_jax.core.errors import ConfigError
from moe_jax.run import command

VIEWS = ((400, "light"), (1400, "light"), (400, "dark"), (1400, "dark"))
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic")
_FLAGS += ("--no-first-run", "--disable-background-networking")
_FLAGS += ("--disable-component-update", "--disable-sync")
_FLAGS += ("--remote-debugging-pipe", "--hide-scrollbars")
_SECONDS = 60  # That an answer may take.
_LEAST_PATHS = 4  # Of a figure with axes and a line.
_LEAST_PIXELS = 10  # Size of letters that can be read.
_SHOWN = 10  # Faults of a view that are printed.
_TALLEST = 16_000  # Pixels of a picture.
_MEASURE = """
(() => {
  const root = document.documentElement, faults = [], figures = [];
  for (const image of document.images)
    if (!image.naturalWidth) faults.push(`no image: ${image.alt}`);
  for (const svg of document.querySelectorAll("figure > svg")) {
    const title = svg.getAttribute("aria-label");
    const boxes = [...svg.querySelectorAll("text")].map(
      t => [t.textContent, t.getBoundingClientRect(),
        parseFloat(getComputedStyle(t).fontSize) * svg.getScreenCTM().a]);
    const edge = svg.getBoundingClientRect();
    boxes.forEach(([word, a, size], i) => {
      if (a.left < edge.left - 1 || a.right > edge.right + 1 ||
          a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
        faults.push(`${title}: "${word}" crosses the edge of the figure`);
      if (size < LEAST)
        faults.push(`${title}: the letters of "${word}" have ${size} pixels`);
      for (const [other, b] of boxes.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
          faults.push(`${title}: "${word}" overlaps "${other}"`);
    });
    figures.push([title, svg.querySelectorAll("path").length]);
  }
  // Drawers beside the window, and what scrolls in a box of its own.
  const apart = e => e && e != document.body && (
    getComputedStyle(e).position == "fixed" ||
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX) ||
    apart(e.parentElement));
  const out = [...document.querySelectorAll("body *")].filter(
    e => !e.closest("svg") && !apart(e) &&
      e.getBoundingClientRect().right > root.clientWidth + 1);
  return {width: root.clientWidth, across: root.scrollWidth,
    height: root.scrollHeight, figures, faults,
    out: out.map(e => e.tagName + " " + e.textContent.slice(0, 40))};
})()
""".replace("LEAST", str(_LEAST_PIXELS))


class View(NamedTuple):
  """A page as it was shown: its faults, number of figures, height and picture."""

  faults: list[str]
  figures: int
  height: int
  png: bytes


class Browser(contextlib.AbstractContextManager):
  """A headless Chromium, spoken to by its DevTools protocol over two pipes."""

  def __init__(self):
    """Raises ConfigError where there is no Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
      raise ConfigError(
        "there is no chromium on the PATH; install the package of your system"
      )
    self._stack = contextlib.ExitStack()
    profile = self._stack.enter_context(
      tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    )
    (read, there), (here, write) = os.pipe(), os.pipe()
    # Chromium reads from 3 and writes to 4, so these go out of the way first.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (here, there)]

    def place():
      for fd, number in zip(theirs, (3, 4)):
        os.dup2(fd, number)

    self._process = subprocess.Popen(
      [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      preexec_fn=place,
      pass_fds=(3, 4),
    )
    for fd in (here, there, *theirs):
      os.close(fd)
    self._out, self._told = write, queue.Queue()
    self._events, self._last = [], 0
    threading.Thread(target=self._listen, args=(read,), daemon=True).start()

  def __exit__(self, *_):
    self._process.kill()
    self._process.wait()
    os.close(self._out)
    self._stack.close()

  def _listen(self, fd):
    with open(fd, "rb") as file:
      rest = b""
      while content := file.read1(1 << 20):
        *messages, rest = (rest + content).split(b"\0")
        for message in messages:
          self._told.put(json.loads(message))

  def ask(self, method: str, session: str | None = None, **params) -> dict:
    """The result of a method of the protocol."""
    self._last += 1
    message = {"id": self._last, "method": method, "params": params}
    message |= {"sessionId": session} if session else {}
    os.write(self._out, json.dumps(message).encode() + b"\0")
    while True:
      told = self._told.get(timeout=_SECONDS)
      if told.get("id") == self._last:
        assert "error" not in told, told
        return told["result"]
      self._events.append(told)

  def show(self, url: str, width: int, scheme: str, site: str = "") -> View:
    """Opens a page, and waits until it is there; it may load what `site` begins."""
    target = self.ask("Target.createTarget", url="about:blank")["targetId"]
    session = self.ask("Target.attachToTarget", targetId=target, flatten=True)
    session = session["sessionId"]
    for domain in ("Page", "Network", "Runtime", "Log"):
      self.ask(f"{domain}.enable", session)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    self.ask("Emulation.setEmulatedMedia", session, features=media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1}
    metrics = "Emulation.setDeviceMetricsOverride"
    self.ask(metrics, session, **size, mobile=False)
    self._events = []
    self.ask("Page.navigate", session, url=url)
    while all(e["method"] != "Page.loadEventFired" for e in self._events):
      self._events.append(self._told.get(timeout=_SECONDS))
    found = self.ask(
      "Runtime.evaluate", session, expression=_MEASURE, returnByValue=True
    )["result"]["value"]
    height = min(found["height"], _TALLEST)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    picture = self.ask(
      "Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True
    )["data"]
    beside = ("data:", site) if site else ("data:",)
    faults = [*_told_faults(self._events, url, beside)]
    faults += _measured_faults(found)
    self.ask("Target.closeTarget", targetId=target)
    picture = base64.b64decode(picture)
    return View(faults, len(found["figures"]), found["height"], picture)


def _told_faults(events, url, beside):
  """Faults that the browser has told of while a page was loaded."""
  for event in events:
    params = event.get("params", {})
    if event["method"] == "Network.requestWillBeSent":
      asked = params["request"]["url"]
      if asked != url and not asked.startswith(beside):
        yield f"it asks for {asked}"
    elif event["method"] == "Runtime.consoleAPICalled":
      yield f"console: {params['args']}"
    elif event["method"] == "Runtime.exceptionThrown":
      yield f"exception: {params['exceptionDetails']['text']}"
    elif event["method"] == "Log.entryAdded":
      yield f"log: {params['entry']['text']}"


def _measured_faults(found):
  """Faults of a page as it is laid out."""
  yield from found["faults"]
  if found["across"] > found["width"]:
    yield f"it scrolls sideways: {found['across']} of {found['width']} pixels"
  yield from (f"out of the window: {words}" for words in found["out"])
  for title, paths in found["figures"]:
    if paths < _LEAST_PATHS:
      yield f"{title}: a figure of {paths} paths is empty"


def main(argv=None) -> int:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m tests.pages",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("pages", nargs="+", metavar="FILE.html")
  words = "folder of the pictures; default: a new one for temporary files"
  parser.add_argument("--out", metavar="DIR", help=words)
  words = "folder whose files the pages may load"
  parser.add_argument("--site", metavar="DIR", help=words)
  args = parser.parse_args(argv)
  site = f"{pathlib.Path(args.site).resolve().as_uri()}/" if args.site else ""
  for path in args.pages:
    if not pathlib.Path(path).is_file():
      raise ConfigError(f"{path} is no file; give pages")
  out = pathlib.Path(args.out or tempfile.mkdtemp(prefix="pages-"))
  out.mkdir(parents=True, exist_ok=True)
  number = 0
  with Browser() as browser:
    for path in map(pathlib.Path, args.pages):
      for width, scheme in VIEWS:
        view = browser.show(path.resolve().as_uri(), width, scheme, site)
        name = f"{path.absolute().parent.name}_{path.stem}_{width}_{scheme}.png"
        picture = out / name
        picture.write_bytes(view.png)
        print(
          f"{picture}: {view.figures} figures, {view.height} pixels high,"
          f" {len(view.faults)} faults"
        )
        for fault in view.faults[:_SHOWN]:
          print(f"  {fault}")
        number += len(view.faults)
  return 1 if number else 0


if __name__ == "__main__":
  command.run(lambda: main(sys.argv[1:]))
