"""What a run is, what it read and what it did, in words and pictures."""
