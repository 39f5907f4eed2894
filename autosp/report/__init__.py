"""What a person reads: tables and pictures."""
