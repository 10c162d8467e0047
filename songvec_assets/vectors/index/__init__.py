"""The index of a table: of which kinds it may be, when it is built, how, with what memory, and what it finds."""
