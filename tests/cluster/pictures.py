"""Pictures of the Ray dashboard, by an installed Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path

_WAIT_MS = 4000


def take_pictures(dashboard: str, folder: Path, pages: tuple[str, ...]) -> list[Path]:
    """Writes one PNG for each page of the dashboard ("cluster", "jobs"); none where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("  no Chromium here: no pictures of the dashboard")
        return []
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        for name in pages:
            page.goto(f"{dashboard}/#/{name}")
            page.wait_for_timeout(_WAIT_MS)
            taken.append(folder / f"ray-dashboard-{name}.png")
            page.screenshot(path=taken[-1])
        browser.close()
    return taken
