"""What mkdocs is told beyond mkdocs.yml: a page may link to any file of the repository, as it does
on a forge. The files that are linked to become part of the site, under ``repository/``."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def _place(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"repository/{path}"


def _path(place: str) -> str:
    """The reverse."""
    outside = place.removeprefix("repository/")
    return outside if outside != place else f"docs/{place}"


def _targets(path: str, text: str) -> set[str]:
    """The files that a page of the repository links to."""
    links = LINK.findall(FENCE.sub("", text))
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take along what is linked to, and what that links to."""
    waiting = [_path(file.src_uri) for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        found = _targets(path, (ROOT / path).read_text(encoding="utf-8"))
        for target in sorted(found - seen):
            seen.add(target)
            if target.startswith("docs/") or not (ROOT / target).is_file():
                continue  # mkdocs knows it, or complains of it
            files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn paths of the repository into those of the site."""
    place = page.file.src_uri
    folder = posixpath.dirname(_path(place))

    def moved(link: re.Match[str]) -> str:
        target = _place(posixpath.normpath(posixpath.join(folder, link[1])))
        return posixpath.relpath(target, posixpath.dirname(place) or ".")

    return LINK.sub(moved, markdown)
