"""What mkdocs does besides rendering docs/: adds pages that live elsewhere, and the reference of the config tree.

Links in the repository are written for GitHub, from file to file. `on_page_markdown` turns them into links of the site,
and drops those whose target is not in it, such as LICENSE.
"""

import posixpath
from pathlib import Path

from config_reference import baselines_page, make_pages
from links import Link, rewrite
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "results/README.md": "results/index.md",
}
WIDE = ("index.md", "quickstart.md", "bad-inputs.md", "results/tables/")  # pages without a list of contents beside them
SAME_PLACE = ("results/tables/*.md", "results/figures/*.png", "results/records/README.md")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages that a folder lists, not mkdocs.yml: tables and config groups."""
    for name, found in (("tables", _tables()), ("config", _config_pages())):
        for section in config.nav or []:
            for pages in section.values():
                if isinstance(pages, list) and f"{name}/" in pages:
                    pages[pages.index(f"{name}/")] = {name.capitalize(): found}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not below docs/."""
    for name, target in (PAGES | _same_place()).items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    generated = {f"reference/config/{name}.md": text for name, text in make_pages(CONF).items()}
    generated["reference/baselines.md"] = baselines_page(CONF)
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    source = page.file.src_uri
    if source.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    if page.file.abs_src_path is None:  # generated, with links of the site
        return markdown
    sources = {target: name for name, target in (PAGES | _same_place()).items()}
    return rewrite(markdown, sources.get(source, f"docs/{source}"), lambda link: _site_link(link, source))


def _site_link(link: Link, source: str) -> str:
    pages = PAGES | _same_place()
    if link.path not in pages and not link.path.startswith("docs/"):
        return link.label.removeprefix("!")[1:-1]
    target = pages.get(link.path, link.path.removeprefix("docs/"))
    anchor = f"#{link.anchor}" if link.anchor else ""
    return f"{link.label}({posixpath.relpath(target, posixpath.dirname(source) or '.')}{anchor})"


def _tables() -> list[str]:
    tables = sorted(name for name in _same_place().values() if name.startswith("results/tables/"))
    return ["results/tables/index.md", *(name for name in tables if not name.endswith("/index.md"))]


def _config_pages() -> list[str]:
    names = ["index", *(name for name in make_pages(CONF) if name != "index")]
    return [f"reference/config/{name}.md" for name in names]


def _same_place() -> dict[str, str]:
    paths = [str(path.relative_to(ROOT)) for pattern in SAME_PLACE for path in ROOT.glob(pattern)]
    return {path: path.replace("/README.md", "/index.md") for path in paths}
