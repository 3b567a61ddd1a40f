"""What mkdocs.yml needs beyond settings: the site's tree, and what the docstrings here do that Google's style does not say."""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SITE = (
    "*.md", "LICENSE", "docs/**/*.md", "docs/**/*.png", "docs/**/*.svg", "docs/**/*.yaml", "docs/*.css", "benchmarks/results/**/*.*",
    "entropy_po/**/*.py", "kernels/*.*", "csrc/**/*.*", "examples/*.py", "examples/*.ipynb", "tests/*.py", "benchmarks/*.py",
)  # fmt: skip
# the names of sections here, and those that the parser of Google's style reads
SECTIONS = {name: name for name in ("Args", "Returns", "Raises", "Attributes", "Numerics", "Note")} | {
    "Example": "Examples"
}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)


def on_files(files: Files, config) -> Files:
    """The site is the repository: each file at its path from the root, so that a link which works on a code host works here.

    Only the web addresses of docs/ leave that name out.
    """
    for file in [file for file in files if file.src_dir == config.docs_dir]:  # not the theme's
        files.remove(file)
    for path in sorted({path for pattern in SITE for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        file = File.generated(config, name, abs_src_path=str(path))
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        files.append(file)
    return files


class Docstrings(griffe.Extension):
    """Sections need no empty line before them; a comment behind a field, or the help text of an argument, documents it."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = SECTION.sub(lambda match: f"\n{SECTIONS[match[1]]}:", obj.docstring.value)
        elif obj.is_attribute and obj.lineno and obj.parent.is_class:
            value = ast.parse(str(obj.value), mode="eval").body if obj.value is not None else None
            parts = [*value.args, *(keyword.value for keyword in value.keywords)] if isinstance(value, ast.Call) else []
            texts = [node.value for part in parts[1:] for node in ast.walk(part) if isinstance(node, ast.Constant)]
            text = obj.lines[0].partition("  # ")[2]
            if texts:  # _arg(default, help), or field(default=default, metadata={"help": help})
                obj.value, text = ast.unparse(parts[0]), texts[-1]
            if text:
                obj.docstring = griffe.Docstring(text, parent=obj)
