"""Speed and memory, each command printing one JSON line."""
