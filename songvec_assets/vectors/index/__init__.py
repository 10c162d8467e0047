"""The IVFFlat index of a table: when it is built, how, with what memory, and what it finds."""
