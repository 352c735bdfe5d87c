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
SAME_PLACE = (
    "results/tables/*.md",
    "results/figures/*.png",
    "results/records/README.md",
    "examples/*.md",
)
FOLDERS = {"examples": "Examples", "results/tables": "Tables", "reference/config": "Config"}  # listed by `_pages_in`


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of a folder into the navigation where mkdocs.yml names the folder, as in `results/tables/`."""
    for section in config.nav or []:
        for pages in section.values():
            for folder, title in FOLDERS.items():
                if isinstance(pages, list) and f"{folder}/" in pages:
                    pages[pages.index(f"{folder}/")] = {title: _pages_in(folder)}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not below docs/."""
    for name, target in _copied_pages().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    for name, text in _made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    source = page.file.src_uri
    if source.startswith(WIDE):
        page.meta["hide"] = ["toc"]
    if page.file.abs_src_path is None:  # made here, with links of the site
        return markdown
    sources = {target: name for name, target in _copied_pages().items()}
    return rewrite(markdown, sources.get(source, f"docs/{source}"), lambda link: _site_link(link, source))


def _site_link(link: Link, source: str) -> str:
    pages = _copied_pages() | {name: _code_page(name) for name in _examples()}
    if link.path not in pages and not link.path.startswith("docs/"):
        return link.label.removeprefix("!")[1:-1]
    target = pages.get(link.path, link.path.removeprefix("docs/"))
    anchor = f"#{link.anchor}" if link.anchor else ""
    return f"{link.label}({posixpath.relpath(target, posixpath.dirname(source) or '.')}{anchor})"


def _copied_pages() -> dict[str, str]:
    """Returns {file in the repository: page of the site} of the pages outside of docs/."""
    paths = [str(path.relative_to(ROOT)) for pattern in SAME_PLACE for path in ROOT.glob(pattern)]
    return PAGES | {path: path.replace("/README.md", "/index.md") for path in paths}


def _made_pages() -> dict[str, str]:
    """Returns {page: its text} of the pages that are no file: the config reference, the baselines, examples as code."""
    made = {f"reference/config/{name}.md": text for name, text in make_pages(CONF).items()}
    made["reference/baselines.md"] = baselines_page(CONF)
    for name in _examples():
        code = (ROOT / name).read_text(encoding="utf-8")
        made[_code_page(name)] = f"# {Path(name).name}\n\n```python\n{code}```\n"
    return made


def _pages_in(folder: str) -> list[str]:
    """Returns the pages of a folder in the order in which they are made, `index` first."""
    found = [name for name in (*sorted(_copied_pages().values()), *_made_pages()) if posixpath.dirname(name) == folder]
    return sorted(found, key=lambda name: not name.endswith("/index.md"))


def _examples() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*.py"))


def _code_page(example: str) -> str:
    return example.replace(".py", ".md")
