"""Token files of other projects, read where they lie."""
