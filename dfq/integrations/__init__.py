"""dfq inside other frameworks' own training."""
