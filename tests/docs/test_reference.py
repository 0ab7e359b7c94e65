"""docs/api-reference.md is what the server says of itself."""

from tests.docs.reference import reference
from tests.servers import ROOT


def test_the_reference_is_current() -> None:
    """Else: python -m tests.docs.reference > docs/api-reference.md."""
    page = (ROOT / "docs" / "api-reference.md").read_text(encoding="utf-8")
    assert page == reference()
