"""`clue-ds report`: pages about runs, which need nothing beside them."""
