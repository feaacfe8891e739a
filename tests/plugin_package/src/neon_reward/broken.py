"""A plug-in that lacks one of its own dependencies."""

import a_package_that_nobody_has  # noqa: F401
