"""The demo video model: clips rendered with their captions, programs that train on them, one that measures."""
