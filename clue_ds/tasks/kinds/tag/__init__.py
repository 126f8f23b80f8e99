"""Finding entities in texts."""
