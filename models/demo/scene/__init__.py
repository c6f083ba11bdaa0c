"""The demo VGGT: scenes ray-cast with exact depth and pose, a program that trains on them, one that measures."""
