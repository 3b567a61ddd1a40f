"""Every Python block of the README and the docs runs, in its page's own namespace, in order; the site is whole."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What the reference must list in full: a module by its __all__, or by the public names that it defines or hands on.
DOCUMENTED = (
    "entropy_po", "entropy_po.policy_gradient", "entropy_po.trainer", "entropy_po.integrations.transformers",
    "entropy_po.integrations.trl", "entropy_po.integrations.verl", "entropy_po.integrations.openrlhf",
)  # fmt: skip


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text(encoding="utf-8"))], ids=name_of)
def test_python_blocks_run(page):
    text, namespace = page.read_text(encoding="utf-8"), {}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start()) + 2
        source = "\n" * (line - 1) + block.group(1)  # errors name the page's own line
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent == ROOT or p.name == "inside.md"], ids=name_of)
def test_files_that_are_named_exist(page):
    """Paths in backticks, of the files that a contributor is sent to."""
    for path in re.findall(
        r"`((?:entropy_po|kernels|csrc|tests|benchmarks|docs)/[\w/.-]*)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    tests = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", page.read_text(encoding="utf-8"))) <= tests


def test_the_claims_quote_the_studies():
    """Every difference and its interval, as a committed result has it."""
    text = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    quoted = re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", text)
    studies = (ROOT / "benchmarks" / "results" / "studies").glob("*.md")
    found = "".join(page.read_text(encoding="utf-8") for page in studies)
    assert len(quoted) >= 10
    assert not [figure for figure in quoted if figure not in found]


class Html(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if key in attrs}
        self.targets |= {attrs[key] for key in ("href", "src") if attrs.get(key)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site by path, as `make docs` builds it: mkdocs turns each of its warnings into an error."""
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return {path.resolve(): Html(path) for path in folder.rglob("*.html")}


def test_the_site_has_no_dead_link(site):
    """Of pages, anchors, pictures, styles and scripts, as a browser resolves them."""
    for path, page in site.items():
        if path.name == "404.html":  # served from anywhere, with absolute addresses
            continue
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme in ("http", "https", "mailto", "data", "javascript"):
                continue
            found = (path.parent / unquote(url.path)).resolve() if url.path else path
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path} links to {target}"
            if url.fragment and found in site:
                assert unquote(url.fragment) in site[found].ids | {"__skip", ""}, f"{path} links to {target}"


def test_lists_and_tables_are_read_as_such(site):
    """A code host takes a list that follows a line of prose; the site wants an empty line between them."""
    for path in site:
        unread = re.findall(r"<p>[^<]*\n(?:[-*] |\|).*", path.read_text(encoding="utf-8"))
        assert not unread, f"{path}: {unread}"


def public_names(module):
    """Of a module: __all__, or else what it defines; of a package without one, what it hands on."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    if hasattr(module, "__path__"):
        return {name for name, value in vars(module).items() if name[0] != "_" and not inspect.ismodule(value)}
    return {
        name for name, value in vars(module).items()
        if name[0] != "_" and callable(value) and value.__module__ == module.__name__
    }  # fmt: skip


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_is_in_the_reference(site, module):
    if module.endswith(".trl"):
        pytest.importorskip("trl")
    names = public_names(importlib.import_module(module))
    assert names
    missing = {f"{module}.{name}" for name in names} - set().union(*(page.ids for page in site.values()))
    assert not missing, f"no page under docs/api/ has {sorted(missing)}"


def test_the_reference_tells_shapes_errors_and_equations(site):
    """What the docstrings say arrives, and where they have no words of their own the comments and help texts do."""
    (operators,) = (path for path in site if path.parts[-3:-1] == ("api", "operators"))
    (trainer,) = (path for path in site if path.parts[-3:-1] == ("api", "trainer"))
    text = re.sub(r"<[^>]+>", "", operators.read_text(encoding="utf-8"))
    for words in (
        "[N, D], fp32 / bf16 / fp16 / fp64", "loss   = sum_i pair_weights_i loss_i", "nats", "[B, 2], a log pi - b log ref",
        "a shape, dtype, device or range that can never work", "arXiv 2411.07595",
    ):  # fmt: skip
        assert words in text, words
    assert "Below R in reward, or above K relatively" in trainer.read_text(encoding="utf-8")
    for path in (path for path in site if "api" in path.parts):
        unread = re.findall(r"<p>[^<]*\b(?:Args|Returns|Raises|Examples?):\s", path.read_text(encoding="utf-8"))
        assert not unread, f"{path}: a section that was taken for prose: {unread}"


def test_the_pictures_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "docs/pictures.py", str(tmp_path)], cwd=ROOT, check=True, timeout=300)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs/pictures").iterdir()}
