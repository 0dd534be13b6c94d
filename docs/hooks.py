"""What mkdocs does besides: links out of docs/, anchors as on GitHub, diagrams.

The pages are written for two readers, GitHub and the site. `../kernels/README.md` works on GitHub;
the site has no such page, so `on_page_markdown` makes it a link to the repository, after looking
whether the file is there. A strict build fails on a warning.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from pymdownx.slugs import slugify
from pymdownx.superfences import fence_div_format

__all__ = ["on_config", "on_page_markdown", "outside_links"]

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?P<path>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
LOG = logging.getLogger("mkdocs.hooks.links")


def on_config(config: Any) -> Any:
    """Headings get GitHub's anchors; fences called mermaid are diagrams."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    mermaid = {"name": "mermaid", "class": "mermaid", "format": fence_div_format}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [mermaid]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links out of docs/ as links to the repository."""
    text, missing = outside_links(markdown, page.file.src_uri, config.repo_url)
    for path in missing:
        LOG.warning("%s links to %s, which does not exist", page.file.src_uri, path)
    return text


def outside_links(text: str, page: str, repository: str) -> tuple[str, list[str]]:
    """The text with repository links for paths that leave docs/, and paths that do not exist.

    `page` is its path below docs/.
    """
    missing: list[str] = []

    def linked(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match["path"]))
        if path.startswith("docs/"):
            return match.group()
        there = ROOT / path
        if path.startswith("..") or not there.exists():
            missing.append(match["path"])
            return match.group()
        kind = "tree" if there.is_dir() else "blob"
        return f"{repository.rstrip('/')}/{kind}/main/{path}{match['anchor'] or ''}"

    return LINK.sub(linked, text), missing
