"""What hardware can do."""
