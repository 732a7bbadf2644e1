"""Write docs/api.md from the docstrings: ``make docs``.

griffe reads the sources and does not import them, except for the declared options: their names, defaults and help are
shown in a table. Docstrings are in Google's style; ``:class:`` and the like become links where the page has what they
name.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

import griffe
from griffe import DocstringSectionKind as Kind

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from local_attention import options
from local_attention.training.schema import keys_of, markdown_table

PAGE = ROOT / "docs" / "api.md"

PACKAGE = "local_attention"
# Modules that a person imports by name, and what is shown of them; None: what the module's __all__ names.
MODULES: dict[str, Sequence[str] | None] = {
    PACKAGE: None,
    f"{PACKAGE}.decoding": None,
    f"{PACKAGE}.torch_state": ("torch_state", "load_torch_state"),
    f"{PACKAGE}.einops_mindspore": (),  # its classes are the package's
}

INTRODUCTION = """\
# API reference

Made from the docstrings by `make docs`: edit those, not this page. What the options do, with examples, is in
[local_attention.md](local_attention.md)."""

LINE = 100  # characters; a longer signature has a line for each argument

ROLE = re.compile(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc|const|obj):`~?\.?([^`]+)`")
# How a class says that its constructor takes the fields of a dataclass of local_attention.options.
DECLARED = re.compile(r"The arguments are those of :class:`(\w+Options)`\.")
LITERAL = re.compile(r"(?<!`)``([^`]+)``(?!`)")

PUBLIC = (Kind.parameters, Kind.returns, Kind.yields)

Documented = griffe.Class | griffe.Function


def page() -> str:
    """The text of docs/api.md.

    Raises:
        ValueError: for names that the sources do not have.
    """
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)], resolve_aliases=True, allow_inspection=False)
    modules = {name: package[name.removeprefix(f"{PACKAGE}.")] if name != PACKAGE else package for name in MODULES}
    shown = {name: documented(module, MODULES[name]) for name, module in modules.items()}
    headings = list(MODULES)
    for objects in shown.values():
        headings += [name for thing in objects for name, _ in with_methods(thing)]

    parts = [INTRODUCTION, "\n".join(contents(name, objects) for name, objects in shown.items())]
    for name, objects in shown.items():
        parts += [f"## `{name}`", *docstring(modules[name])]
        for thing in objects:
            for heading, described in with_methods(thing):
                level = "###" if described is thing else "####"
                parts += [f"{level} `{heading}`", signature(described), *docstring(described)]

    def reference(match: re.Match[str]) -> str:
        path = match[1].strip()
        for name in (path, path.removeprefix(f"{PACKAGE}."), f"{PACKAGE}.{path}", path.rpartition(".")[2]):
            if name in headings:
                return link(name)
        return f"`{path}`"

    return LITERAL.sub(r"`\1`", ROLE.sub(reference, "\n\n".join(parts))) + "\n"


def contents(module: str, objects: list[Documented]) -> str:
    names = ", ".join(link(thing.name) for thing in objects)
    return f"- {link(module)}: {names}" if names else f"- {link(module)}"


def link(heading: str) -> str:
    """A link to a heading in backticks, with the anchor that GitHub gives it."""
    return f"[`{heading}`](#{heading.lower().replace('.', '')})"


def documented(module: griffe.Object | griffe.Alias, names: Sequence[str] | None) -> list[Documented]:
    if names is None:
        if module.exports is None:
            raise ValueError(f"expected {module.path} to have an __all__")
        names = [str(name) for name in module.exports]
    objects = []
    for name in names:
        if name not in module.members:
            raise ValueError(f"expected {module.path} to have {name}")
        thing = module.members[name]
        target = thing.final_target if isinstance(thing, griffe.Alias) else thing
        if isinstance(target, Documented) and target.docstring:
            objects.append(target)
    return objects


def with_methods(thing: Documented) -> Iterator[tuple[str, Documented]]:
    """The headings of a function, or of a class and its methods, inherited ones last, and what they describe."""
    yield thing.name, thing
    if isinstance(thing, griffe.Class):
        for name, member in (thing.members | thing.inherited_members).items():
            method = member.final_target if isinstance(member, griffe.Alias) else member
            if isinstance(method, griffe.Function) and is_public(method):
                yield f"{thing.name}.{name}", method


def is_public(method: griffe.Function) -> bool:
    """Whether a docstring says what a method takes or returns; where it does not, the method is the class's own."""
    if method.docstring is None or method.name.startswith("_"):
        return False
    return method.name == "construct" or any(section.kind in PUBLIC for section in parse(method.docstring))


def signature(thing: Documented) -> str:
    if isinstance(thing, griffe.Class):
        constructor = thing.all_members.get("__init__")
        target = constructor.final_target if isinstance(constructor, griffe.Alias) else constructor
        line = thing.name
        if match := DECLARED.search(thing.docstring.value if thing.docstring else ""):
            line = f"{thing.name}({', '.join(declared_arguments(getattr(options, match[1])))})"
        elif isinstance(target, griffe.Function):
            line = target.signature(name=thing.name, return_type=False)
    else:
        line = thing.signature()
    if len(line) > LINE:
        line = "\n".join(one_argument_per_line(line))
    return f"```python\n{line}\n```"


def declared_arguments(schema: type) -> Iterator[str]:
    if all(field.kw_only for field in dataclasses.fields(schema)):
        yield "*"
    for name, option in keys_of(schema).items():
        yield name if option.default is dataclasses.MISSING else f"{name}={option.default!r}"


def one_argument_per_line(line: str) -> Iterator[str]:
    name, arguments = line.split("(", 1)
    yield f"{name}("
    depth, begin = 0, 0
    for i, sign in enumerate(arguments):
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            yield f"    {arguments[begin:i].strip()},"
            yield arguments[i:]
            return
        if sign == "," and depth == 0:
            yield f"    {arguments[begin : i + 1].strip()}"
            begin = i + 1


def docstring(thing: griffe.Object | griffe.Alias) -> Iterator[str]:
    """The docstring, and that of a class's constructor, in Markdown."""
    constructor = thing.members.get("__init__") if thing.is_class else None
    for written in (thing.docstring, constructor.docstring if constructor else None):
        if written is not None:
            for section in parse(written):
                yield from markdown(section)


def parse(written: griffe.Docstring) -> list[griffe.DocstringSection]:
    """The sections of a docstring, apart from its function, as the types of arguments are in the signature."""
    options = {"warnings": False, "returns_multiple_items": False, "returns_named_value": False}
    return griffe.Docstring(written.value, lineno=written.lineno).parse("google", **options)


def markdown(section: griffe.DocstringSection) -> Iterator[str]:
    value = section.value
    if section.kind is Kind.text:
        yield DECLARED.sub(lambda match: markdown_table(getattr(options, match[1])).rstrip(), value)
        return
    if section.kind is Kind.admonition:
        yield f"**{section.title or value.kind.capitalize()}**"
        yield value.description
        return
    yield {Kind.parameters: "**Arguments**"}.get(section.kind, f"**{section.kind.value.capitalize()}**")
    if section.kind in (Kind.returns, Kind.yields):
        # what stands before a colon is taken for a type
        yield "\n".join(
            f"{item.annotation}: {item.description}" if item.annotation else item.description for item in value
        )
    elif section.kind in (Kind.raises, Kind.warns):
        yield "\n".join(bullet(str(item.annotation), item.description) for item in value)
    elif section.kind is Kind.examples:
        yield "\n\n".join(text if kind is Kind.text else f"```pycon\n{text}\n```" for kind, text in value)
    else:
        yield "\n".join(bullet(item.name, item.description) for item in value)


def bullet(names: str, description: str) -> str:
    quoted = ", ".join(f"`{name.strip()}`" for name in names.split(","))
    return "- " + indent(f"{quoted}: {description}", "  ").removeprefix("  ")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
