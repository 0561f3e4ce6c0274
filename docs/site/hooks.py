# SPDX-License-Identifier: Apache-2.0
"""What the site needs beyond the pages in docs/: pages from elsewhere, and links of the repository.

A link is written for the repository, relative to its file. On the site it leads to a page where the
target is one; otherwise to the file in the repository (`extra.repository` in mkdocs.yml), or, while
that is empty, it is the file's name.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.livereload import LiveReloadServer
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# A child of mkdocs' logger: with --strict a warning fails the build.
logger = logging.getLogger("mkdocs.hooks.repository")

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
# Characters of a table's cell that is not broken: a name, or a figure with what it is of.
SHORT = 18
# Pages that stand elsewhere in the repository.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deploying.md",
}


class RepositoryLinks(Treeprocessor):
    """Links of one page after another.

    Attributes:
        source: The page's file, by its path in the repository.
        sources: Of every page and figure, its path in the repository by that on the site.
        repository: Where the repository can be read; empty where it cannot.
    """

    source = ""
    sources: dict[str, str] = {}  # noqa: RUF012
    repository = ""

    def run(self, root: Element) -> None:
        for link in root.iter("a"):
            self._turn(link, "href")
        for image in root.iter("img"):
            self._turn(image, "src")
        for cell in (*root.iter("td"), *root.iter("th")):
            if len("".join(cell.itertext())) <= SHORT:
                cell.set("class", "short")

    def _turn(self, element: Element, attribute: str) -> None:
        """Make one link right for the site."""
        target = urlsplit(element.get(attribute, ""))
        if target.scheme or not target.path:
            return
        folder = posixpath.dirname(self.source)
        path = posixpath.normpath(posixpath.join(folder, target.path))
        here = posixpath.dirname(self._on_site(self.source) or "")
        page = self._on_site(path)
        if page is not None:
            element.set(attribute, target._replace(path=posixpath.relpath(page, here)).geturl())
        elif not (ROOT / path).exists():
            logger.warning("%s links to %s, which does not exist", self.source, target.path)
        elif self.repository:
            file = target._replace(path=path).geturl()
            element.set(attribute, f"{self.repository.rstrip('/')}/{file}")
        else:
            _name(element, path)

    def _on_site(self, path: str) -> str | None:
        return self.sources.get(path)


def _name(link: Element, path: str) -> None:
    """Turn a link into its text, followed by the file's name where the text does not say it."""
    text = "".join(link.itertext())
    link.attrib.clear()
    link.tag = "span"
    if posixpath.basename(path) not in text:
        if len(link):
            link[-1].tail = f"{link[-1].tail or ''}: "
        else:
            link.text = f"{text}: "
        name = Element("code")
        name.text = path
        link.append(name)


class _Links(Extension):
    """One processor for all pages: mkdocs makes a new Markdown for each."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = RepositoryLinks()

    def extendMarkdown(self, md: Markdown) -> None:
        # After inline patterns (20), before mkdocs' own (0), which finds the page of a path.
        md.treeprocessors.register(self.processor, "repository_links", 5)


_LINKS = _Links()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    _LINKS.processor.repository = config.extra["repository"]
    config.markdown_extensions.append(_LINKS)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    sources = {}
    for file in files:
        sources[f"{DOCS}/{file.src_uri}"] = file.src_uri
    for source, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
        sources[source] = uri
    _LINKS.processor.sources = sources
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    elsewhere = {uri: source for source, uri in ELSEWHERE.items()}
    _LINKS.processor.source = elsewhere.get(uri, f"{DOCS}/{uri}")
    # What a generated page says to who edits it; mkdocs wants the title first.
    return re.sub(r"\A<!--.*?-->\n", "", markdown, flags=re.DOTALL)


def on_serve(
    server: LiveReloadServer, config: MkDocsConfig, builder: Callable[[], None]
) -> LiveReloadServer:
    for source in ELSEWHERE:
        server.watch(str(ROOT / source))
    return server
