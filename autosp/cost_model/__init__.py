"""What a pass will take: time, memory, and the least time that any schedule could."""
