"""Links of docs/ that lead out of it, into the code: what the site makes of them.

On GitHub they open the file. The site has no code, so there the path stands beside the text. That
they lead somewhere is checked here, as mkdocs checks all others.
"""

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.hooks.site_links")

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """Return the text of a page without the links that the site cannot follow."""
    return without_links(markdown, page.file.src_uri)


def without_links(markdown: str, page: str) -> str:
    """Write links to files outside docs/, and to folders, as their text and path.

    Args:
        markdown: the text of the page.
        page: its path in docs/.
    """
    docs = ROOT / "docs"

    def name(link: re.Match[str]) -> str:
        text, address = link.groups()
        target = ((docs / page).parent / address).resolve()
        if target.is_relative_to(docs) and not target.is_dir():
            return link[0]
        if not target.exists():
            logger.warning("docs/%s has a link to %s, which does not exist", page, address)
        path = target.relative_to(ROOT) if target.is_relative_to(ROOT) else address
        return text if str(path) in text else f"{text} (`{path}`)"

    return LINK.sub(name, markdown)
