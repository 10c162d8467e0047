"""The database: connections, sessions, error messages, and schema `songvec`."""
