"""The parts of the command `qdq`. Nothing here is public; `qdq.cli` puts it together."""
