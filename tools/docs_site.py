"""Hooks of mkdocs.yml: what the pages link to outside docs/ becomes part of the site.

So one Markdown serves the site and a code host. A page or picture that is reached by links from docs/ or from the
navigation, such as `../bench/results/drift/report.md`, is added under its path in the repository; its own links are
followed too. A link that leads nowhere is mkdocs's own error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)((?:#[^)\s]*)?\))|((?:src|srcset|href)=\")([^\"#]+)(\")")
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_SHOWN = {".md", ".png", ".svg"}


def links(markdown: str) -> list[str]:
    """Targets of the relative links of a page, without anchors."""
    found = (match[2] or match[5] for match in _LINK.finditer(_FENCE.sub("", markdown)))
    return [unquote(target) for target in found if not re.match(r"[a-z]+:|/", target)]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages lead to; in mkdocs they are called `../<path in the repository>`."""
    todo = [(file.src_uri, target) for file in files.documentation_pages() for target in links(file.content_string)]
    todo += [("index.md", target) for target in _of_navigation(config.nav)]
    while todo:
        page, target = todo.pop()
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if not uri.startswith("../") or uri.startswith("../docs/") or files.get_file_from_path(uri):
            continue
        path = ROOT / uri.removeprefix("../")
        if not path.is_file() or path.suffix not in _SHOWN:
            raise PluginError(f"{page} links to {target}: a page shows {', '.join(sorted(_SHOWN))} of this repository")
        file = File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
        file.dest_uri = _place(uri.removeprefix("../"))
        files.append(file)
        if path.suffix == ".md":
            todo += [(uri, further) for further in links(path.read_text())]
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links back into docs/ by the names that mkdocs has; each op once in the table of contents."""
    if not page.file.src_uri.startswith("../"):
        listed = r"\1\n    options:\n      show_root_toc_entry: false"
        return re.sub(r"(?<=\n)(::: shira_kernels\.(\w+))$", listed, markdown, flags=re.M)
    folder = posixpath.dirname(page.file.src_uri)

    def shortened(match: re.Match[str]) -> str:
        begin, target, end = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], match[6])
        inside = posixpath.normpath(posixpath.join(folder, target)).removeprefix("../")
        if not inside.startswith("docs/"):
            return match[0]
        return f"{begin}/{inside.removeprefix('docs/')}{end}"  # from the root of docs/, as mkdocs.yml says

    return _LINK.sub(shortened, markdown)


def _place(path: str) -> str:
    """Where a file of the repository lies in the site: bench/README.md is bench/index.html."""
    return re.sub(r"/README\.md$", "/index.md", path).removesuffix(".md") + ".html" * path.endswith(".md")


def _of_navigation(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry or []
    return [target for part in parts for target in _of_navigation(part)]
