"""A page as a headless browser sees it."""

import html
import json
import re
import subprocess
from pathlib import Path


def open_page(browser: str, page: Path, profile: Path) -> tuple[list[int], list[str]]:
    """Width of each picture as the browser decoded it, and the lines on its console.

    The page is opened twice: as it is, for its console, and as a copy that may run a script, for the pictures.
    """
    probe = """<script>addEventListener("load", () => {
        document.title = JSON.stringify([...document.images].map(image => image.naturalWidth)) })</script></body>"""
    copy = page.with_name("probed.html")
    text = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", page.read_text("utf-8"))
    copy.write_text(text.replace("</body>", probe), "utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --enable-logging=stderr --v=0 --user-data-dir={profile} --dump-dom"
    )
    seen = [
        subprocess.run(
            [browser, *options.split(), path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        for path in (page, copy)
    ]
    title = re.search(r"<title>(\[.*?\])</title>", seen[1].stdout)
    assert title, "the probe did not run"
    return json.loads(html.unescape(title[1])), [line for line in seen[0].stderr.splitlines() if "CONSOLE" in line]
