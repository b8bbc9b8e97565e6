"""The ring: memory files that hold batches, and the encoding of a batch in one."""
