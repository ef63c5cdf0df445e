"""What the tests of causes share: the trained model and English."""

import pytest

from tests.meta.explaining import Subject, trained


@pytest.fixture(scope="session")
def subject() -> Subject:
    return trained()
