"""Everything that was paid for: per model and range a folder of Arrow files and their manifest."""
