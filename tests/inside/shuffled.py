"""A plugin of pytest that shuffles the tests: `-p shuffled`, with a SEED in the environment."""

import os
import random


def pytest_collection_modifyitems(items: list) -> None:
    random.Random(os.environ["SEED"]).shuffle(items)  # noqa: S311  # no secret
