import pytest

from scripts import make_api_reference
from scripts.make_api_reference import PAGE, page


def test_the_api_reference_is_what_the_docstrings_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/api.md is out of date: run make docs"


def package(folder, **sources):
    (folder / "toy").mkdir()
    for name, source in sources.items():
        (folder / "toy" / f"{name}.py").write_text(source)
    return folder


def page_of(monkeypatch, folder, modules):
    monkeypatch.setattr(make_api_reference, "ROOT", folder)
    monkeypatch.setattr(make_api_reference, "PACKAGE", "toy")
    monkeypatch.setattr(make_api_reference, "MODULES", modules)
    return page()


TOY = '''
class Base:
    def call(self, x: int, /, *rest, key=None, **options) -> str:
        """Call.

        Args:
            x: a number, see :meth:`Toy.call` and ``other``.
            a, b: two that share
                two lines.

        Returns:
            in every case: a word, e.g. of :class:`numpy.ndarray`.
        """

    def helper(self):
        """What the class itself needs."""


class Toy(Base):
    """A toy, see :class:`Base`.

    Raises:
        ValueError: never.
    """

    def __init__(self, *, size: int = 3): ...


def undocumented(): ...
'''


def test_signature_sections_and_links_come_from_the_source(monkeypatch, tmp_path):
    init = '"""Toys."""\nfrom toy.toys import Toy, undocumented\n__all__ = ["Toy", "undocumented"]\n'
    text = page_of(monkeypatch, package(tmp_path, __init__=init, toys=TOY), {"toy": None})
    assert "- [`toy`](#toy): [`Toy`](#toy)\n" in text
    assert (
        "```python\nToy(*, size: int = 3)\n```\n\nA toy, see `Base`.\n\n**Raises**\n\n- `ValueError`: never.\n" in text
    )
    assert "#### `Toy.call`\n\n```python\ncall(x: int, /, *rest, key=None, **options) -> str\n```" in text
    assert (
        "- `x`: a number, see [`Toy.call`](#toycall) and `other`.\n- `a`, `b`: two that share\n  two lines.\n" in text
    )
    assert "**Returns**\n\nin every case: a word, e.g. of `numpy.ndarray`.\n" in text
    assert "helper" not in text and "### `undocumented`" not in text


def test_a_long_signature_has_a_line_for_each_argument(monkeypatch, tmp_path):
    arguments = ["*", *(f"argument_{i}: dict[str, tuple[int, int]]" for i in range(9)), "last=(1, 2)", "**others"]
    source = f'"""Toys."""\n__all__ = ["long"]\ndef long({", ".join(arguments)}) -> int:\n    """Long."""\n'
    text = page_of(monkeypatch, package(tmp_path, __init__=source), {"toy": None})
    assert "long(\n" + "".join(f"    {argument},\n" for argument in arguments) + ") -> int\n```" in text


@pytest.mark.parametrize(
    ("modules", "message"),
    [({"toy": None}, "expected toy to have an __all__"), ({"toy": ("gone",)}, "expected toy to have gone")],
)
def test_a_name_that_is_gone_is_an_error(monkeypatch, tmp_path, modules, message):
    with pytest.raises(ValueError, match=message):
        page_of(monkeypatch, package(tmp_path, __init__='"""Toys."""\n'), modules)
