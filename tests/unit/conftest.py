"""What several unit tests need."""

from collections.abc import Iterator

import pytest

from tests.sites import Site


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server for one test."""
    site = Site()
    yield site
    site.close()
