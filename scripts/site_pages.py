"""Hooks of the documentation site (`mkdocs.yml`): files beside docs/ become pages of it, and links to them follow.

`CHANGELOG.md` and its neighbors stay where people look for them in a repository, and are read from there. A page that
would fetch something from elsewhere stops the build, and so does one whose text HTML would take for a tag.
"""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url


ROOT = Path(__file__).parent.parent
# File of the repository -> page of the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/README.md": "recipes.md",
    "CITATION.cff": "cite.md",
    "model_cards/demo-lm.md": "model-card.md",
}
CITE = """# How to cite

Cite the software, and the paper of the method that you use: `hf-pm methods` and [the table](methods.md) name it.
Reference managers and code hosts read `CITATION.cff`:

```yaml
{}
```
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written elsewhere."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text()
        content = CITE.format(text.rstrip()) if source.endswith(".cff") else text
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the pages that stand for those files."""
    uri = page.file.src_uri
    origin = next((source for source, name in OUTSIDE.items() if name == uri), f"docs/{uri}")

    def replace(match: re.Match[str]) -> str:
        target = ((ROOT / origin).parent / match[1]).resolve()
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        inside = OUTSIDE.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        return match[0] if inside is None else f"]({get_relative_url(inside, uri)}{match[2]})"

    prose = re.sub(r"```.*?```|(`+).+?\1", "", markdown, flags=re.DOTALL)
    if found := re.search(r"<(?!!--)[A-Za-z/][^>]*>", prose):
        raise PluginError(
            f"{origin} has {found[0]!r} outside of code, which HTML takes for a tag. Put it in backticks."
        )
    return re.sub(r"\]\((?![a-z]+:)([^)#\s]+)((?:#[^)\s]*)?)\)", replace, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch a script, a picture or a font from elsewhere."""
    fetched = r"""<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]+(?:src|href)="(?:https?:)?//[^"]+"""
    found = re.search(fetched, output)
    if found:
        raise PluginError(f"{page.file.src_uri} would fetch something from elsewhere: {found[0]}")
    return output


class Docstrings(griffe.Extension):
    """Two habits of the sources that the page of classes has no use for.

    Inner products, written `<F, delta^2>`, get mathematical brackets: HTML has its own use for the others. Arguments,
    in transformers' form (`int`, *optional*, defaults to `8`), keep the type: the default comes from the signature.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"<([A-Za-z][^<>\n]*, [^<>\n]*)>", r"⟨\1⟩", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( {4}\w+) \((`.*?)\):", _plain_type, text, flags=re.MULTILINE)


def _plain_type(argument: re.Match[str]) -> str:
    kinds = argument[2].split(", *optional*")[0].replace("`, `", "` or `").replace("`", "")
    return f"{argument[1]} ({kinds}):"
