"""What a pass does, as data: the action list, and how a candidate is lowered to it."""
