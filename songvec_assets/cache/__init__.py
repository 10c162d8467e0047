"""What is already paid for: one Arrow IPC file a range and model."""
