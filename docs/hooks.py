"""The pages of the site that stand nowhere as they are shown: made from the README, the notebook and the commands."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from pscope.cli.app import app

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = {
    "index.md": "README.md",
    "tour.md": "docs/tour.ipynb",
    "data.md": "data/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "CITATION.cff": "CITATION.cff",
}
"""What of the site is a file of the repository that stands elsewhere or otherwise, and that file."""

LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)"\s#:]+)(?=[)"#])')

OF_PANDAS = re.compile(r'<style scoped>.*?</style>| border="1" class="dataframe"', re.DOTALL)
"""How its tables look; here they look as all others do."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is no file of docs/."""
    # Here, so that the tests need no MkDocs to read what is made.
    from mkdocs.structure.files import File

    for name, text in made().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """A page's text with links that lead where the site has what they name in the repository."""
    return linked(markdown, page.file.src_uri)


def made() -> dict[str, str]:
    """The text of each file of the site that is no file of docs/."""
    pages = {name: (ROOT / path).read_text("utf-8") for name, path in PAGES.items()}
    return {**pages, "tour.md": notebook(pages["tour.md"]), "commands.md": commands()}


def linked(markdown: str, name: str) -> str:
    """The text of a page with its links, which are those of the repository, as the site has them."""
    folder = posixpath.dirname(PAGES.get(name, f"docs/{name}"))
    shown = {path: page for page, path in PAGES.items()}

    def on_the_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] + shown.get(path, path.removeprefix("docs/"))

    return LINK.sub(on_the_site, markdown)


def notebook(text: str) -> str:
    """A notebook's cells, with the outputs that it keeps."""
    return "\n\n".join(
        _code(cell) if cell["cell_type"] == "code" else "".join(cell["source"]) for cell in json.loads(text)["cells"]
    )


def _code(cell: dict) -> str:
    shown = [f"```python\n{''.join(cell['source'])}\n```"]
    for data in (output["data"] for output in cell["outputs"] if "data" in output):
        if "text/html" in data:
            shown.append(f'<div class="output">{OF_PANDAS.sub("", "".join(data["text/html"]))}</div>')
        elif "image/png" in data:
            shown.append(f"![The figure that this draws](data:image/png;base64,{''.join(data['image/png']).strip()})")
        else:
            shown.append(f"```text\n{''.join(data['text/plain'])}\n```")
    return "\n\n".join(shown)


def commands() -> str:
    """Every command with its options, as its `--help` tells them, and in the same panels."""
    group = typer.main.get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"pscope {name}")
        panels.setdefault(command.rich_help_panel, []).append(f"### pscope {name}\n\n{_told(command, context)}")
    parts = [f"## {panel}\n\n" + "\n\n".join(sections) for panel, sections in panels.items()]
    return "\n\n".join(["# Commands", _told(group, typer.Context(group, info_name="pscope")), *parts])


def _told(command: typer.core.TyperCommand, context: typer.Context) -> str:
    usage = " ".join([context.info_name, *command.collect_usage_pieces(context)])
    tables: dict[str, list[str]] = {}
    for option in command.params:
        names, told = option.get_help_record(context)
        told, extra = re.fullmatch(r"(.*?)(?:  \[(.*)\])?", told, re.DOTALL).groups()
        panel = option.rich_help_panel or ("Options" if option.param_type_name == "option" else "Arguments")
        cells = (f"`{names}`", told.replace("|", r"\|"), (extra or "").removeprefix("default: "))
        tables.setdefault(panel, []).append(f"| {' | '.join(cells)} |")
    head = "| {} | | Default |\n| --- | --- | --- |\n"
    shown = [head.format(panel) + "\n".join(rows) for panel, rows in tables.items()]
    return "\n\n".join([f"```text\n{usage}\n```", command.help, *shown])
