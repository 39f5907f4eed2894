"""Which candidates there are, which one to try next, and when to stop."""
