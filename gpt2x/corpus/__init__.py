"""Documents out of files, tables, datasets, packages and conversations."""
