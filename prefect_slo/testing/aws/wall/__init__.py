"""A folder for ``PYTHONPATH``: what starts with it on its path cannot reach AWS."""
