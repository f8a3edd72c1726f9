"""One file a stage, each declaring what it reads, which fields shape it, and what it writes."""
