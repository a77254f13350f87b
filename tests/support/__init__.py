"""What several test files import: `pythonpath` in pyproject.toml makes it the package `support`."""
