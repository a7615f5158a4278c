"""Settings shared by all tests."""

from hypothesis import settings

import vision  # noqa: F401 (lets torchvision be imported beside a PyTorch without its compiled operators)

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", deadline=None, derandomize=False, print_blob=True, database=None)
settings.load_profile("default")
