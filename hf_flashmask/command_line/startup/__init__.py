"""A folder for PYTHONPATH. Nothing of it is imported by this package."""
