"""What the site takes from outside of docs/: the notebooks."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


# Before mkdocs-jupyter, which turns the notebooks among the files into pages.
@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every notebook as a page."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File(path.name, str(NOTEBOOKS), config.site_dir, config.use_directory_urls))
    return files
