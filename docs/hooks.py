"""Build hook of MkDocs: copies the files of experiments/results that a page refers to.

A page refers to such a file by its path in the repository, `../experiments/results/...`, so that
the link also works where the page is read as a plain file. The site gets a copy under `results/`.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).resolve().parent.parent
_PREFIX = "../experiments/results/"
_LINK = re.compile(re.escape(_PREFIX) + r"([\w./-]+)")


def on_files(files, config):
    """Adds every file that a page refers to."""
    pages = [file.content_string for file in files.documentation_pages()]
    for name in sorted({name for page in pages for name in _LINK.findall(page)}):
        source = _ROOT / "experiments" / "results" / name
        if source.is_file():  # otherwise MkDocs reports the link
            files.append(File.generated(config, f"results/{name}", abs_src_path=str(source)))
    return files


def on_page_markdown(markdown, **_):
    """Points the links at the copies."""
    return markdown.replace(_PREFIX, "results/")
