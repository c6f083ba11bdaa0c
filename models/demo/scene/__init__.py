"""The demo VGGT: scenes ray-cast with exact depth and pose, the program that trains on them, and the one that measures."""
