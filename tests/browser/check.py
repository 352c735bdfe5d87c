"""Opens a report in headless Chromium and uses it: keyboard, filters, both colour schemes, narrow windows, print.

python tests/browser/check.py REPORT.html [SCREENSHOTS]     # `make test-page` makes two reports first

Needs Playwright's Python package and a Chromium: Debian's, or the one that CHROMIUM names.
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS, SCHEMES = (1300, 400), ("light", "dark")
LONGEST_LOAD = 10.0  # seconds, on a busy machine


def main() -> None:
    """Runs all checks; fails with the first that does not hold."""
    report, *folder = map(Path, sys.argv[1:])
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("Chromium is needed, got none. Run `apt-get install chromium`, or set CHROMIUM to its path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for scheme in SCHEMES:
            for width in WIDTHS:
                context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
                page = context.new_page()
                said, requests = [], []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, requests=requests: requests.append(request.url))
                page.goto(report.absolute().as_uri())
                check_layout(page, scheme)
                if folder:
                    folder[0].mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=folder[0] / f"{report.stem}-{scheme}-{width}.png")
                    page.screenshot(path=folder[0] / f"{report.stem}-{scheme}-{width}-whole.png", full_page=True)
                check_sorting(page)
                check_filters(page)
                check_runs(page)
                check_layout(page, scheme)
                own = [url for url in requests if not url.startswith("data:")]
                assert not said, said
                assert set(own) == {report.absolute().as_uri()}, own
                print(f"{scheme}, {width} pixels: works")
                context.close()
        page = browser.new_page()
        page.goto(report.absolute().as_uri())
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF") and len(pdf) > 10_000
        print(f"prints to {len(pdf) / 1e3:.0f} kB of PDF")
        browser.close()


def check_layout(page: Page, scheme: str) -> None:
    """The page loads soon, is no wider than its window, and has the ground of its colour scheme."""
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < page.evaluate(timing) < 1000 * LONGEST_LOAD
    excess = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(excess) <= 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(ground.split("(")[1].split(",")[0])
    assert (red > 200) == (scheme == "light"), ground


def column(page: Page, name: str) -> list[float | None]:
    """Returns the numbers of the visible rows in a column."""
    return page.evaluate(
        """(name) => {
            const table = document.getElementById("results");
            const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.innerText.trim() === name);
            return [...table.tBodies[0].rows].filter((row) => !row.hidden)
                .map((row) => row.cells[at].dataset.n ? Number(row.cells[at].dataset.n) : null);
        }""",
        name,
    )


def check_sorting(page: Page) -> None:
    """A column is sorted from the keyboard, both ways, and says so."""
    button = page.get_by_role("button", name="Parameters", exact=True)
    if not button.count():
        button = page.get_by_role("button", name="Answer NLL", exact=True)
    name = button.inner_text().strip()
    head = page.get_by_role("columnheader", name=name, exact=True)
    assert head.get_attribute("aria-sort") == "none"
    seen = []
    for key in ("Enter", "Space"):
        button.focus()
        page.keyboard.press(key)
        direction = head.get_attribute("aria-sort")
        numbers = [number for number in column(page, name) if number is not None]
        assert numbers == sorted(numbers, reverse=direction == "descending") and len(numbers) > 1
        assert f"sorted by {name}, {direction}" in page.get_by_role("status").inner_text()
        seen.append(direction)
    assert set(seen) == {"ascending", "descending"}
    assert page.evaluate("document.activeElement.textContent.trim()") == name


def check_filters(page: Page) -> None:
    """A search and a choice hide the other rows, and one button shows them again."""
    whole = len(column(page, "Answer NLL"))
    page.get_by_label("Search").fill("dense 0")
    found = page.locator("#results tbody tr:visible")
    assert 0 < found.count() < whole
    assert all("dense" in text.lower() for text in found.all_inner_texts())
    page.get_by_label("Search").fill("")
    choice = page.locator("select[data-column]").first
    name = choice.locator("option").nth(1).inner_text()
    choice.select_option(name)
    names = page.locator("#results tbody tr:visible th").evaluate_all("cells => cells.map((cell) => cell.dataset.v)")
    assert set(names) == {name}
    page.get_by_role("button", name="Show all rows").click()
    assert page.get_by_role("status").inner_text().startswith(f"{whole} of {whole} rows")


def check_runs(page: Page) -> None:
    """A link in the table opens the fold of its run, which has a plan and a command; the skip link comes first."""
    link = page.locator("#results tbody a").last
    link.focus()
    page.keyboard.press("Enter")
    fold = page.locator(f"{link.get_attribute('href')}")
    fold.locator("svg").first.wait_for(state="visible")
    assert fold.evaluate("fold => fold.open") and " method=" in fold.inner_text()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.goto(page.url.split("#")[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


if __name__ == "__main__":
    main()
