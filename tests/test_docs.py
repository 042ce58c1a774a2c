"""The pages: every command parses, both languages give the same commands, every link leads
somewhere, every test that is named is there."""
import argparse
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest

from config import get_config
from common import ROOT

PAGES = sorted(path.relative_to(ROOT) for folder in (".", "docs", "data", "models", "benchmarks")
               for path in (ROOT / folder).glob("*.md"))


class Parsed(Exception):
    """Raised in the place of all that follows the command line."""


def commands(page):
    """The commands of a page's blocks, without comments. Returns: list of lists of str."""
    found, text = [], (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        variables = dict(re.findall(r'^(\w+)="(.*?)"$', block, re.MULTILINE | re.DOTALL))
        block = re.sub(r'^\w+=".*?"$', "", block, flags=re.MULTILINE | re.DOTALL)
        for name, value in variables.items():
            block = re.sub(rf"\${name}\b", " ".join(value.split()), block)
        lines = block.replace("\\\n", " ").replace(" && ", "\n").splitlines()
        found += [shlex.split(line, comments=True) for line in lines]
    return [command for command in found if command]


def parse(path, flags):
    """Let a script read its command line, and do no more."""
    original = argparse.ArgumentParser.parse_known_args

    def once(parser, args=None, namespace=None):
        found, unknown = original(parser, args, namespace)
        assert not unknown
        if hasattr(found, "preset"):
            fields = vars(get_config())
            get_config(found.preset, {name: value for name, value in vars(found).items()
                                      if name in fields})
        raise Parsed

    main = runpy.run_path(str(ROOT / path))["main"]
    with mock.patch("argparse.ArgumentParser.parse_known_args", once), \
            mock.patch("sys.argv", [str(path), *flags]), pytest.raises(Parsed):
        main()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_commands_of_a_page_parse(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands(page):
        if command[0] == "make":
            assert command[1] in targets, command
        scripts = [number for number, word in enumerate(command) if word.endswith(".py")]
        if command[0] in ("python", "torchrun") and scripts and command[1] != "-m":
            parse(Path(command[scripts[0]]), command[scripts[0] + 1:])


@pytest.mark.parametrize("page", [page for page in PAGES if page.name.endswith(".en.md")], ids=str)
def test_both_languages_give_the_same_commands(page):
    assert commands(page) == commands(page.with_name(page.name.replace(".en.md", ".md")))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    for link in filter(None, (part for pair in links for part in pair)):
        if "://" not in link and "/actions/" not in link:  # which only the host has
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            if anchor:
                assert anchor in anchors(target), link


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def test_the_tests_that_docs_name_are_there():
    text = (ROOT / "docs" / "robustness.en.md").read_text(encoding="utf-8")
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
