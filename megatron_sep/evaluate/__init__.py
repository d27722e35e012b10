"""What models score on texts."""
