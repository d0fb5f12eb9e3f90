"""One draft for all tests of exports."""

from __future__ import annotations

import pytest
from exports_case import Case, make_case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("target") / "model")
