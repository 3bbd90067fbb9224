"""The documentation in a browser: no page is wider than its window, pictures load, nothing comes from elsewhere."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"phone": 390, "desktop": 1280}
HARNESS = """<!doctype html><title>harness</title><body><script>
const pages = %s, width = %d, found = [];
async function look(page) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  const loaded = new Promise(resolve => frame.onload = resolve);
  document.body.append(frame);
  await loaded;
  const shown = frame.contentDocument;
  for (const image of shown.images) image.loading = "eager";
  await Promise.all([...shown.images].map(image => image.decode().catch(() => null)));
  const loads = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  found.push({
    page,
    title: shown.querySelector("h1")?.textContent ?? "",
    width: shown.documentElement.scrollWidth,
    broken: [...shown.images].filter(image => !image.naturalWidth).map(image => image.src),
    foreign: loads.filter(name => !name.startsWith(location.origin)),
  });
  frame.remove();
}
(async () => {
  for (const page of pages) await look(page);
  await fetch("/", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


Seen = list[dict[str, Any]]


class Handler(SimpleHTTPRequestHandler):
    """Serves the site; what the harness posts goes into the queue."""

    def __init__(self, *args: Any, results: Queue[Seen], **kwargs: Any) -> None:
        self.results = results
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("mkdocs")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder], cwd=ROOT, check=True)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Queue[Seen]]]:
    """The address of a server of the folder, and what is posted to it."""
    results: Queue[Seen] = Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder), results=results))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", results
    finally:
        server.shutdown()
        server.server_close()


def seen(folder: Path, width: int, profile: Path) -> Seen:
    """What each page looks like in a window of this width."""
    pages = sorted(f"/{path.relative_to(folder)}" for path in folder.rglob("*.html") if "harness" not in path.name)
    harness = folder / f"harness-{width}.html"
    harness.write_text(HARNESS % (json.dumps(pages), width))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", f"--user-data-dir={profile}"]
    with served(folder) as (address, results):
        command = [str(CHROMIUM), *flags, f"{address}/{harness.name}"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            found = results.get(timeout=300)
        finally:
            browser.terminate()
            browser.wait()
    assert [each["page"] for each in found] == pages
    return found


@pytest.mark.slow
@pytest.mark.parametrize("device", WIDTHS)
def test_pages_fit_their_window(site: Path, device: str, tmp_path: Path) -> None:
    found = seen(site, WIDTHS[device], tmp_path)
    assert len(found) > 50
    assert not [each["page"] for each in found if not each["title"]]
    assert not [(each["page"], each["width"]) for each in found if each["width"] > WIDTHS[device]]
    assert not [(each["page"], each["broken"]) for each in found if each["broken"]]
    assert not [(each["page"], each["foreign"]) for each in found if each["foreign"]]
